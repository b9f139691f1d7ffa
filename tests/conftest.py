"""Settings of the whole test run."""

import fcntl
import functools
import gc
import os
import random
import signal
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch


def patch_language_once_a_launch():
    """Have Triton's interpreter patch `triton.language` once per module and launch.

    It does so at each call of a device function, which takes a third of its time; only the end of a launch undoes it.
    A Triton without these names is left as it is.
    """
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    executor = getattr(interpreter, "GridExecutor", None)
    if patch is None or executor is None:
        return
    launch, patched = executor.__call__, set()

    def patch_once(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_afresh(self, *arguments, **options):
        patched.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, executor.__call__ = patch_once, launch_afresh


def remember_types():
    """Have Triton's interpreter work out the properties of a shape or a type once, not at each operation.

    That takes a third of its time. A Triton without these names is left as it is.
    """
    from triton.language import core
    from triton.runtime import interpreter

    get = getattr(interpreter, "_get_np_dtype", None)
    if get is None or not hasattr(core, "block_type"):
        return
    of_block, of_tensor = core.block_type.__init__, core.tensor.__init__
    dtypes, blocks, tensors = {}, {}, {}

    def get_once(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = get(dtype)
        return dtypes[name]

    def init_block(self, element_ty, shape):
        key = element_ty.name, *shape
        if key not in blocks:
            of_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def init_tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in tensors:
            of_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = get_once, init_block, init_tensor


def remember_docstrings():
    """Have tyro read the docstrings of a class once, not at each command line: that takes a quarter of its time."""
    from tyro import _docstrings

    tokens = getattr(_docstrings, "_ClassTokenization", None)
    if tokens is not None:
        tokens.make = staticmethod(functools.cache(tokens.make))


# PyTorch's operators on one thread: two on the busy cores of a small machine wait for each other.
torch.set_num_threads(1)
# Where there is no GPU, Triton's kernels run under its interpreter. It must know before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_language_once_a_launch()
    remember_types()
remember_docstrings()
# Started in the background by a shell, this process and those that it starts would not hear Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def whole_float32():
    """A GPU's products and convolutions in float32 are not cut to TF32, and what a run sets is not left to others."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def seed(name):
    number = zlib.crc32(name.encode())
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - timm draws from the global generator
    random.seed(number)


@pytest.fixture(autouse=True)
def seeded(request):
    """A test draws the same random numbers alone, in any order and on any worker."""
    seed(request.node.nodeid)


def pytest_fixture_setup(fixturedef):
    """So does a fixture that several tests share, whichever of them is the first."""
    if fixturedef.scope != "function":
        seed(fixturedef.argname)


@pytest.fixture
def ended(capsys):
    """Function: what a command has printed, stdout and stderr, that ends with this exit status."""

    def run(status, main, *arguments):
        with pytest.raises(SystemExit) as stop:
            main(*arguments)
        assert stop.value.code == status
        return capsys.readouterr()

    return run


@pytest.fixture
def device():
    """The GPU, or the CPU, where Triton's interpreter runs the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="signals in each test of a run that is stopped and resumed")
    parser.addoption("--damages", type=int, default=10, help="damaged checkpoints in the test that resumes from them")


def pytest_sessionstart(session):
    """Let one of several workers compile the host stage; otherwise all would compile it at the same time."""
    if not hasattr(session.config, "workerinput"):
        return
    from fastdeit.pipelines.host.stage import _run_units
    from fastdeit.pipelines.jit import is_compiled
    from tests.contact_sheet import pairs, plan_of

    with open(Path(tempfile.gettempdir(), f"fastdeit-tests-{os.getuid()}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if is_compiled(_run_units) is False:
            photo = np.zeros((8, 8, 3), np.uint8)
            pairs(photo, plan_of(photo, ["Rotate"], 8), 8)


def pytest_collection_finish():
    """Garbage collection, which tests ask for too, need not look through all that was imported each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
