"""The checks of `fastdeit-doctor`, each of one part of the machine.

They run where everything else is broken, so this file imports only Python's own modules; each check imports the
package that it examines.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import sysconfig
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdeit.pipelines.errors import UserError

GIB = 2**30
MODULES = {"pillow": "PIL"}  # distributions whose module has another name
FFCV_SYSTEM = "apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++"
DALI = re.compile(r"nvidia-dali-cuda(\d+)0$")  # nvidia-dali-cuda120 is built with CUDA 12


@dataclass(frozen=True)
class Check:
    """One result.

    status  ok; warn: it works, but not as well as it could; absent: not here, and not needed; fail: training is not
            possible
    """

    name: str
    status: Literal["ok", "warn", "absent", "fail"]
    detail: str
    remedy: str = ""


def sentence(error: BaseException) -> str:
    """The type of an error and its first line, shortened."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {textwrap.shorten(lines[0] if lines else '', 160)}"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(library: str | Path) -> ctypes.CDLL | OSError:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        return error


def system() -> Check:
    """Operating system and Python."""
    detail = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    if platform.system() != "Linux":
        return Check("system", "warn", detail, "fastdeit is tested only on Linux")
    return Check("system", "ok", f"{platform.freedesktop_os_release().get('PRETTY_NAME', 'Linux')}, {detail}")


def cpu() -> Check:
    """Cores that this process may use; a container's quota counts."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} of {os.cpu_count()} cores, {model[1].strip() if model else platform.machine()}"
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
    if quota != "max" and int(quota) / int(period) < cores:
        granted = int(quota) / int(period)
        return Check(
            "cpu",
            "warn",
            f"{detail}, but the container may use {granted:g} at a time",
            f"give the container more, or set --data.threads {max(1, round(granted))}",
        )
    return Check("cpu", "ok", detail)


def memory() -> Check:
    """Main memory, or the container's share of it."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip() != "max":
        total = min(total, int(limit.read_text()))
    detail = f"{total / GIB:.1f} GiB, {min(free, total) / GIB:.1f} GiB of it unused"
    if total < 4 * GIB:
        return Check("memory", "warn", detail, "choose a small run.global_batch and data.prefetch 1")
    return Check("memory", "ok", detail)


def shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """The segment that NCCL exchanges gradients through."""
    if not path.exists():
        return Check("/dev/shm", "warn", "not mounted", "several GPUs need it: mount a tmpfs there")
    usage = shutil.disk_usage(path)
    detail = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} GiB of it free"
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(1 << 20))
    except OSError as error:
        remedy = "fastdeit-convert and several GPUs need it: remove files there, or mount a larger tmpfs there"
        return Check("/dev/shm", "warn", f"{detail}, cannot be written ({error.strerror})", remedy)
    if usage.total < GIB:
        return Check("/dev/shm", "warn", detail, "several GPUs need more: docker run --shm-size=8g, or --ipc=host")
    return Check("/dev/shm", "ok", detail)


def open_files() -> Check:
    """The limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} open files (at most {hard})"
    return Check("ulimit -n", "ok", detail) if soft >= 1024 else Check("ulimit -n", "warn", detail, "ulimit -n 4096")


def required() -> list[Check]:
    """Every dependency of fastdeit's own metadata: present, recent enough, and importable."""
    try:
        lines = importlib.metadata.requires("fastdeit") or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("fastdeit", "fail", "not installed", "pip install -e . in the repository")]
    wanted = [match.groups() for line in lines if (match := re.fullmatch(r"([\w-]+)>=([\d.]+)", line.strip()))]
    checks = [Check("fastdeit", "ok", importlib.metadata.version("fastdeit"))]
    return checks + [dependency(name, least) for name, least in wanted]


def dependency(name: str, least: str) -> Check:
    """One Python package that training cannot do without."""
    remedy = f"pip install '{name}>={least}'"
    version = _installed(name)
    if version is None:
        return Check(name, "fail", "not installed", remedy)
    if _release(version) < _release(least):
        return Check(name, "fail", f"{version} is too old", remedy)
    try:
        module = importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # a half-installed package raises anything at all
        return Check(name, "fail", f"{version} does not import: {sentence(error)}", f"reinstall it: {remedy}")
    # PyTorch's module tells its build (+cu130, +cpu), which its distribution may not.
    return Check(name, "ok", str(getattr(module, "__version__", version)))


def driver_cuda() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the NVIDIA driver can run, or None without a driver."""
    library = _load("libcuda.so.1")
    number = ctypes.c_int()
    if isinstance(library, OSError) or library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def gpus() -> list[Check]:
    """Driver, PyTorch's CUDA build, and every GPU that it can use."""
    driver = driver_cuda()
    if driver is None:
        return [Check("gpu", "absent", "no NVIDIA driver here: training runs on the CPU, in fp32")]
    version = Path("/proc/driver/nvidia/version")
    match = re.search(r"(\d+\.\d+(?:\.\d+)?)", version.read_text()) if version.exists() else None
    about = f"driver {match[1] if match else 'of unknown version'}, runs CUDA up to {driver[0]}.{driver[1]}"
    try:
        torch: Any = importlib.import_module("torch")
    except Exception:
        return [Check("gpu", "warn", f"{about}; PyTorch does not import, so nothing more is known")]
    if torch.version.cuda is None:
        remedy = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
        return [Check("gpu", "warn", f"{about}, but PyTorch {torch.__version__} is built for the CPU", remedy)]
    if not torch.cuda.is_available():
        if _release(torch.version.cuda)[0] > driver[0]:
            remedy = f"update the driver, or install PyTorch built with CUDA {driver[0]}"
        else:
            remedy = "check with nvidia-smi whether a GPU is visible; in a container, docker run --gpus all"
        return [Check("gpu", "warn", f"{about}, but PyTorch (CUDA {torch.version.cuda}) sees no GPU", remedy)]
    checks = [Check("cuda", "ok", f"{about}; PyTorch has {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = f"{card.major}.{card.minor}"
        detail = f"{card.name}, compute capability {capability}, {card.total_memory / GIB:.0f} GiB"
        built = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch[3:].isdigit()]
        if card.major * 10 + card.minor < min(built, default=0):
            remedy = "install PyTorch built with an older CUDA: https://pytorch.org/get-started/previous-versions"
            check = Check(f"gpu {index}", "absent", f"{detail}: this PyTorch has no kernels for it", remedy)
        elif card.major < 8:
            check = Check(f"gpu {index}", "warn", f"{detail}, no bf16", "training falls back to fp16 with loss scaling")
        else:
            check = Check(f"gpu {index}", "ok", f"{detail}, bf16")
        checks.append(check)
    return checks


def compiler() -> Check:
    """The C++ compiler and Python headers that torch.compile and Triton build their launchers with."""
    name = os.environ.get("CXX") or next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if name is None:
        return Check("compiler", "absent", "no C++ compiler: torch.compile and Triton need one", "apt-get install g++")
    if not header.exists():
        remedy = "apt-get install python3-dev, for the Python that runs here"
        return Check("compiler", "warn", f"{name}, but {header} is missing, which Triton needs", remedy)
    return Check("compiler", "ok", f"{name}, Python.h")


def triton_check() -> Check:
    """Whether Triton compiles a kernel to machine code: for the first GPU, or for sm_90 without one."""
    version = _installed("triton")
    if version is None:
        return Check("triton", "absent", "not installed: it comes with PyTorch's CUDA builds")
    try:
        import torch
        import triton
        import triton.language as tl
        from triton.backends.compiler import GPUTarget

        @triton.jit
        def probe(out, n):
            i = tl.program_id(0) * 64 + tl.arange(0, 64)
            tl.store(out + i, i.to(tl.float32), mask=i < n)

        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        source = triton.compiler.ASTSource(fn=probe, signature={"out": "*fp32", "n": "i32"})
        with warnings.catch_warnings(action="ignore"):
            compiled = triton.compile(source, target=GPUTarget("cuda", major * 10 + minor, 32))
        size = len(compiled.asm["cubin"])
    except Exception as error:  # its compiler raises many types, none of them its own
        remedy = "reinstall PyTorch, which installs the Triton version that it was tested with"
        if isinstance(error, OSError):
            remedy = "set TRITON_CACHE_DIR to a folder that can be written"
        return Check("triton", "warn", f"{version} cannot compile: {sentence(error)}", remedy)
    return Check("triton", "ok", f"{version}, compiles for sm_{major}{minor} ({size} bytes)")


def compiled_code() -> Check:
    """Whether numba compiles here, and the folder that keeps its code for the next process. It is tried."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            from fastdeit.pipelines.jit import try_cache

            folder = try_cache()
        except Exception as error:  # numba raises many types where it does not work
            remedy = "set NUMBA_CACHE_DIR to a folder that can be written, or reinstall numba"
            return Check("compiled code", "fail", f"numba cannot compile: {sentence(error)}", remedy)
    if folder is None:
        detail = "cannot be kept, so every process compiles again, which takes half a minute"
        return Check("compiled code", "warn", detail, "set NUMBA_CACHE_DIR to a folder that can be written")
    if any("compiled code is kept" in str(one.message) for one in said):
        remedy = "set NUMBA_CACHE_DIR to a permanent folder that can be written"
        return Check("compiled code", "warn", f"is kept in {folder}, a temporary folder", remedy)
    return Check("compiled code", "ok", f"is kept in {folder}")


def turbojpeg() -> Check:
    """The JPEG library that FFCV decodes with."""
    library = _load("libturbojpeg.so.0")
    if isinstance(library, OSError):
        return Check("libturbojpeg", "absent", "not installed: FFCV needs it", "apt-get install libturbojpeg0-dev")
    return Check("libturbojpeg", "ok", "loads")


def ffcv() -> Check:
    """FFCV: the package is there and its C library loads. The package itself takes seconds to import: it is not."""
    version = _installed("ffcv")
    if version is None:
        remedy = f"{FFCV_SYSTEM}, then pip install 'fastdeit[ffcv]'"
        return Check("ffcv", "absent", "not installed: data.loader auto chooses among the others", remedy)
    files = importlib.metadata.files("ffcv") or []
    libraries = [f.locate() for f in files if f.name.startswith("_libffcv") and f.suffix == ".so"]
    rebuild = f"{FFCV_SYSTEM}, then pip install --force-reinstall --no-deps --no-binary ffcv ffcv"
    if not libraries:
        return Check("ffcv", "warn", f"{version} without its C library", rebuild)
    loaded = _load(Path(str(libraries[0])))
    if isinstance(loaded, OSError):
        return Check("ffcv", "warn", f"{version}, but its C library does not load: {loaded}", rebuild)
    try:
        importlib.import_module("cv2")
    except ImportError as error:
        remedy = "pip install --force-reinstall opencv-python-headless, which needs no display libraries"
        return Check("ffcv", "warn", f"{version}, but OpenCV does not import: {sentence(error)}", remedy)
    return Check("ffcv", "ok", f"{version}, its C library loads")


def turbo() -> Check:
    """The turbo loader's decoder; installing builds it if a C compiler and libjpeg-turbo's headers are there."""
    from fastdeit.pipelines.loaders.turbo import find_turbo  # which imports numba, and this takes a second

    try:
        return Check("turbo", "ok", f"built: {find_turbo().name}")
    except UserError as error:
        remedy = "apt-get install gcc libjpeg-dev, then pip install fastdeit again (-e . in a checkout)"
        return Check("turbo", "absent", sentence(error), remedy)


def dali() -> Check:
    """NVIDIA DALI, and whether the driver can run the CUDA that it is built with."""
    driver = driver_cuda()
    extra = "dali-cuda13" if driver and driver[0] >= 13 else "dali"
    remedy = f"pip install 'fastdeit[{extra}]'"
    installed = [
        (name, int(built[1]), distribution.version)
        for distribution in importlib.metadata.distributions()
        if (name := str(distribution.name).lower()) and (built := DALI.match(name))
    ]
    if not installed:
        return Check("dali", "absent", "not installed: data.loader auto chooses among the others", remedy)
    name, cuda, version = installed[0]
    detail = f"{name} {version}"
    if len(installed) > 1:
        others = " ".join(other[0] for other in installed[1:])
        return Check("dali", "warn", f"{detail} and {others} overwrite each other", f"pip uninstall {others}")
    if driver is None:
        return Check("dali", "ok", f"{detail}; without an NVIDIA driver it decodes on the CPU")
    if cuda > driver[0]:
        return Check(
            "dali", "warn", f"{detail}, but the driver runs CUDA {driver[0]}", f"pip uninstall {name}; {remedy}"
        )
    return Check("dali", "ok", detail)


def apex() -> Check:
    """Whether `apex` is NVIDIA's. PyPI's project of that name is a web toolkit, and nothing of either is imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return Check("apex", "absent", "not installed, and not needed: PyTorch's fused AdamW is used")
    folder = Path(next(iter(spec.submodule_search_locations)))
    version = _installed("apex") or "of unknown version"
    if not (folder / "optimizers" / "fused_adam.py").exists():
        remedy = "pip uninstall apex; NVIDIA's is not needed, and is built from https://github.com/NVIDIA/apex"
        return Check("apex", "warn", f"{version} in {folder} is PyPI's project of that name, not NVIDIA's", remedy)
    if importlib.util.find_spec("amp_C") is None:
        remedy = "rebuild it with its C++ and CUDA extensions, or ignore it: it is not needed"
        return Check("apex", "warn", f"NVIDIA's, {version}, built without its CUDA extensions (amp_C)", remedy)
    return Check("apex", "ok", f"NVIDIA's, {version}, with its CUDA extensions")


CHECKS: tuple[Callable[[], Check | list[Check]], ...] = (
    system, cpu, memory, shared_memory, open_files, required, compiled_code, gpus, compiler, triton_check,
    turbojpeg, ffcv, turbo, dali, apex,
)  # fmt: skip
