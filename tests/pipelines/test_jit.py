"""Compiled code on disk must not outlive any file that was compiled into it."""

import errno
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from numba.core import caching

from fastdeit.pipelines import jit
from system import refusing, run_python


def run(folder: Path) -> tuple[int, int]:
    """The value that the compiled function returns, and how many compilations it took from the cache."""
    program = "from package.outer import outer; print(outer(1), sum(outer.stats.cache_hits.values()))"
    out = run_python("-c", program, cwd=folder, check=True)
    value, hits = out.stdout.split()
    return int(value), int(hits)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["host/inner.py", "outer.py"])
def test_a_change_in_any_file_is_seen_and_no_change_is_not_compiled_again(tmp_path, changed):
    package = tmp_path / "package"
    (package / "host").mkdir(parents=True)
    shutil.copy(jit.__file__, package / "compiled.py")
    for name in ("__init__.py", "host/__init__.py", "philox.py", "plan.py"):
        (package / name).write_text("")
    head = "from package.compiled import compiled\n"
    (package / "host/inner.py").write_text(head + "@compiled\ndef inner(x):\n    return x + 1\n")
    (package / "outer.py").write_text(
        head + "from package.host.inner import inner\n@compiled\ndef outer(x):\n    return inner(x) + 1\n"
    )
    assert run(tmp_path) == (3, 0)
    assert run(tmp_path) == (3, 1)
    # The same size, and within the same second.
    file = package / changed
    file.write_text(file.read_text().replace("+ 1", "+ 5"))
    assert run(tmp_path) == (7, 0)


CONTAINER = """
import os, sys, unicodedata, warnings
import numba, numpy as np, inspect, tempfile  # while they can be read, by root
numba.njit(lambda x: x + 1)(np.zeros(3, np.uint8))
root, temporary = sys.argv[1:]
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
os.environ.update(HOME="/nonexistent", TMPDIR=temporary)
os.environ.pop("XDG_CACHE_HOME", None)
sys.dont_write_bytecode = True
sys.path[:0] = [root]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from fastdeit.pipelines.loaders import jpeg_markers
    from fastdeit.pipelines.plan import philox
    assert jpeg_markers.frame_size(np.zeros(10, np.uint8)) == (0, 0)
    from fastdeit.pipelines.jit import try_cache
    folder = try_cache()
assert jpeg_markers.__file__.startswith(root), jpeg_markers.__file__
print(folder)
print(sum(jpeg_markers.frame_size.stats.cache_hits.values()))
print(*[one.message for one in said if "compiled code" in str(one.message)], sep="\\n")
"""


@pytest.fixture
def open_folder():
    """A folder that any user may enter. pytest's own folders are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def install_read_only(root: Path) -> None:
    """Copy the package to `root`, as it is installed, so that nobody can write it."""
    source, ignore = Path(jit.__file__).parent, shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(source.parent / "fastdeit", root / "fastdeit", ignore=ignore)
    for name in ("pipelines", "kernels"):
        shutil.copytree(source.parent / name, root / "fastdeit" / name, ignore=ignore)
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.slow
def test_a_read_only_installation_without_a_home(open_folder):
    """As in a container: the cache lies in a folder of the user's own among temporary files, and is used again."""
    root, temporary = open_folder / "installed", open_folder / "tmp"
    install_read_only(root)
    temporary.mkdir()
    temporary.chmod(0o1777)
    for hits in (0, 1):
        # No PYTHONPATH: through it, Python would find the code under test before the copy.
        done = run_python("-c", CONTAINER, root, temporary, cwd="/", env={"PATH": os.defpath}, status=0)
        folder, found, *said = done.stdout.splitlines()
        own = Path(folder).relative_to(temporary).parts[0]
        assert (temporary / own).stat().st_mode & 0o777 == 0o700
        assert int(found) == hits
        assert len(said) == 1
        assert "set NUMBA_CACHE_DIR to keep it elsewhere" in said[0]
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)


@pytest.mark.parametrize("trap", ["none", "open to all", "a link", "another's", "no sticky bit", "missing"])
def test_a_cache_that_others_could_fill_is_not_used(tmp_path, monkeypatch, trap):
    temporary = tmp_path / "tmp"
    if trap != "missing":
        temporary.mkdir()
        temporary.chmod(0o777 if trap == "no sticky bit" else 0o1777)
    own = temporary / f"fastdeit-numba-{os.getuid()}"
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "elsewhere")
    elif trap == "open to all":
        own.mkdir()
        own.chmod(0o777)
    elif trap == "another's":
        own.mkdir(mode=0o700)
        if os.getuid() == 0:
            os.chown(own, 65534, 65534)
        else:
            monkeypatch.setattr(os, "getuid", lambda: own.stat().st_uid + 1)
            own.rename(temporary / f"fastdeit-numba-{os.getuid()}")
    monkeypatch.setattr(jit.tempfile, "tempdir", str(temporary))
    jit._own_folder.cache_clear()
    try:
        assert jit._own_folder() == (own if trap == "none" else None)
    finally:
        jit._own_folder.cache_clear()
    assert trap != "none" or own.stat().st_mode & 0o777 == 0o700


def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "full.py"
    file.write_text("def triple(x):\n    return 3 * x\n")
    spec = importlib.util.spec_from_file_location("full", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = jit.cached(nogil=True)(module.triple)
    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", refusing(errno.ENOSPC))
    jit._say_once.cache_clear()
    with pytest.warns(UserWarning, match=r"cannot be kept in .*No space left on device.*NUMBA_CACHE_DIR"):
        assert function(2) == 6
