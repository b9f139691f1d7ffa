"""Every peer gives batches of normalised images from the files it was given, and says where it is not installed."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.loaders.contenders import CONTENDERS
from benchmarks.loaders.peers import ours, stream
from benchmarks.loaders.peers.stream import MEAN, STD, Missing, Setting
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from forked import Forked, run_code

COLOURS = ((230, 30, 60), (40, 200, 90))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Photographs of two colours, in stripes."""
    root = tmp_path_factory.mktemp("data")
    for i in range(24):
        folder = root / "photos" / f"class{i % 2}"
        folder.mkdir(exist_ok=True, parents=True)
        pixels = np.empty((60, 80, 3), np.uint8)
        pixels[:] = COLOURS[0]
        pixels[:, (np.arange(80) // 8 + i) % 2 == 0] = COLOURS[1]
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=95)
    convert(str(root / "photos"), root / "photos.beton", progress=False)
    return root


@pytest.fixture
def setting(data, tmp_path):
    def make(name):
        return Setting(name, str(data / "photos"), str(data / "photos.beton"), str(tmp_path), 8, 1, 4)

    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)


# Seeded, since a batch shares its share of Mixup, and four of them may leave few images with a pure colour.
FIRST_BATCHES = """
import os
import random
import sys
import tempfile
import numpy as np
import torch
from benchmarks.loaders.contenders import CONTENDERS
from benchmarks.loaders.peers.stream import Missing, Setting

setting, out = eval(sys.argv[1]), sys.argv[2]
tempfile.tempdir = os.path.dirname(out)  # DALI leaves files behind in a forked process
for seed in (torch.manual_seed, random.seed, np.random.seed):
    seed(1)
try:
    opened = CONTENDERS[setting.name].open(setting)
except Missing as missing:
    sys.exit(f"missing: {missing}")
torch.save([next(opened.images).clone() for _ in range(4)], out)
opened.images.close()
"""


def first_batches(setting, folder):
    """In a process of its own: FFCV's loader leaves numba's types changed for what is compiled after it."""
    out = folder / "batches.pt"
    process = Forked(run_code, FIRST_BATCHES, [repr(setting), str(out)])
    _, said = process.communicate(timeout=300)
    if "missing: " in said:
        pytest.skip(said)
    assert process.returncode == 0, said
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, contender in CONTENDERS.items() if contender.repeats is None])
def test_a_peer_gives_the_pictures_it_was_given(name, setting, tmp_path):
    batches = first_batches(setting(name), tmp_path)
    images = torch.cat(batches).float()
    assert images.shape == (32, 3, 224, 224)
    assert images.isfinite().all()
    assert not torch.equal(batches[0], batches[1])
    pixels = images
    if name != "ffcv-plain":
        pixels = 255 * (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    # Most images keep pixels of both colours through whatever was done to them; a wrong order of channels, a wrong
    # normalisation or a file read as noise leaves none.
    for colour in COLOURS:
        near = (pixels - torch.tensor(colour, dtype=torch.float32).view(3, 1, 1)).abs().amax(1) < 12
        assert near.float().mean((1, 2)).gt(0.02).sum() >= 6


def test_what_is_not_installed_is_missing(setting, monkeypatch):
    with pytest.raises(Missing, match="not installed: pip install it"):
        stream.need("no_such_package.at_all", "pip install it")
    stream.need("torch.utils", "")

    def find():
        raise UserError("the ffcv loader needs FFCV, which is not installed")

    monkeypatch.setattr(ours, "find_libffcv", find)
    with pytest.raises(Missing, match="needs FFCV"):
        ours.fastdeit(setting("fastdeit-ffcv-x1"), "ffcv", 1)
