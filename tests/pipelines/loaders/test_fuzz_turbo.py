"""Mutated JPEGs through the turbo loader's library: each is refused, or decoded to Pillow's pixels; nothing crashes.

FASTDEIT_FUZZ multiplies how many there are.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import damage
from fastdeit.pipelines.loaders import turbo
from fastdeit.pipelines.loaders.turbo import find_turbo
from ordered import need_loader
from pictures import KINDS, SAMPLINGS
from system import run_python

need_loader("turbo")

FUZZ = 400 * int(os.environ.get("FASTDEIT_FUZZ", "1"))


@pytest.fixture(scope="module")
def images(sampled_jpeg):
    return [sampled_jpeg(i, (67, 45), SAMPLINGS[i % 6], **KINDS[i % 5]) for i in range(30)]


# Each file ends where the memory that may be read ends, and each image begins or ends where that which may be written
# does, so that a byte too far ends the process.
FUZZER = """
import ctypes, io, mmap, sys
import numpy as np
from PIL import Image
from damage import MARKERS, mutate

library, folder, count = ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3])
side, size, pointer = ctypes.c_uint32, ctypes.c_size_t, ctypes.c_void_p
decode = library.fastdeit_decode
decode.argtypes = [pointer, size, side, side, pointer, size, side, side, side, side, ctypes.c_int]
libc = ctypes.CDLL(None, use_errno=True)
PAGES, PAGE = 64, mmap.PAGESIZE

def among_tables(rng, size):
    return int(rng.integers(min(size, 700) if rng.random() < 0.5 else size))

def fenced():
    whole = mmap.mmap(-1, (PAGES + 2) * PAGE)
    memory = np.frombuffer(whole, np.uint8)
    for start in (0, (PAGES + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + start), ctypes.c_size_t(PAGE), 0) == 0
    return memory[PAGE : -PAGE]

source, target = fenced(), fenced()
files = [open(f"{folder}/{i}.jpg", "rb").read() for i in range(int(sys.argv[4]))]
rng = np.random.default_rng(int(sys.argv[5]))
verdicts, compared = [0, 0, 0], 0
for trial in range(count):
    whole = files[trial % len(files)]
    height, width = Image.open(io.BytesIO(whole)).size[::-1]
    data = np.frombuffer(mutate(whole, rng, place=among_tables, lengths=MARKERS), np.uint8)
    if rng.random() < 0.1:  # the sides that the file itself says, however odd
        try:
            width, height = Image.open(io.BytesIO(data.data)).size
        except Exception:
            pass
    length = height * width * 3
    if not 0 < length <= len(target):
        continue
    memory = source[len(source) - len(data) :]
    memory[:] = data
    out = target[len(target) - length :] if trial % 2 else target[:length]
    target[:] = 7
    x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
    x1, y1 = int(rng.integers(x0, width)) + 1, int(rng.integers(y0, height)) + 1
    if rng.random() < 0.3:
        x0, y0, x1, y1 = 0, 0, width, height
    verdict = decode(memory.ctypes.data, len(data), height, width, out.ctypes.data, 3 * width, x0, y0, x1, y1, 64)
    verdicts[verdict] += 1
    image = out.reshape(height, width, 3)
    assert (image[:y0] == 7).all() and (image[y1:] == 7).all(), trial
    assert (target == 7).sum() >= len(target) - length
    if verdict == 0:
        try:
            expected = np.asarray(Image.open(io.BytesIO(data.data)).convert("RGB"))
        except Exception:
            continue
        assert (image[y0:y1, x0:x1] == expected[y0:y1, x0:x1]).all(), trial
        compared += 1
print(*verdicts, compared)
"""


def fuzz(tmp_path, images, library, count, seed=0, **environment):
    for i, (data, _) in enumerate(images):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    path = os.path.dirname(damage.__file__)
    done = run_python(
        *("-c", FUZZER, library, tmp_path, count, len(images), seed),
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=30 + count // 10,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    decoded, refused, _, compared = map(int, done.stdout.split())
    return decoded, refused, compared


@pytest.mark.slow
def test_mutated_files_are_refused_or_decoded_as_pillow_does(tmp_path, images):
    decoded, refused, compared = fuzz(tmp_path, images, find_turbo(), FUZZ)
    assert refused > FUZZ // 4
    assert compared > FUZZ // 20
    assert compared <= decoded


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_mutated_files_under_sanitizers(tmp_path, images):
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("the compiler has no sanitizers")
    code = Path(turbo.__file__).with_name("jpeg.c")
    library = tmp_path / "sanitized.so"
    options = ["-shared", "-fPIC", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    subprocess.run(
        ["gcc", *options, "-fno-sanitize-recover", "-o", str(library), str(code), "-ljpeg"], check=True, timeout=60
    )
    # Python itself leaks.
    environment = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    fuzz(tmp_path, images, library, FUZZ // 4, seed=1, **environment)
