"""What a release holds: the sdist, the wheel built from it, and the files that name the version."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from fastdeit import __version__
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.loaders.turbo import find_turbo
from system import run_python

ROOT = Path(__file__).parents[1]
INSTALLED = {"fastdeit": "fastdeit", "kernels": "fastdeit/kernels", "pipelines": "fastdeit/pipelines"}
LIBRARY = "fastdeit/pipelines/loaders/_jpeg.abi3.so"
NEEDED = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "pyproject.toml", "setup.py"}
MADE = {"PKG-INFO", "setup.cfg"}  # by setuptools
# What a working checkout may hold beside its sources.
JUNK = (
    "build/lib/fastdeit/stale.py", "data/train.beton", "fastdeit/.gpu", "fastdeit/train.beton",
    "fastdeit/__pycache__/cli.cpython-311.pyc", "kernels/cache.nbi", "pipelines/host/cache.nbc",
    "pipelines/loaders/_jpeg.cpython-311-x86_64-linux-gnu.so", "runs/demo/log.jsonl",
)  # fmt: skip


def sources():
    """Files of the checkout that belong into a wheel."""
    for top in INSTALLED:
        for pattern in ("*.py", "py.typed", "kernel_table.json", "curves.json"):
            yield from ((ROOT / top).rglob(pattern))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in the sdist and in the wheel that `python -m build` makes of a used checkout."""
    pytest.importorskip("build", reason="pip install build")
    pytest.importorskip("setuptools", minversion="77", reason="pip install 'setuptools>=77'")
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.nbi", "*.nbc", "results")
    for folder in (*INSTALLED, "benchmarks", "tests", "docs", "examples"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in NEEDED:
        shutil.copy(ROOT / name, root / name)
    for name in JUNK:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("junk")
    run_python("-m", "build", "--no-isolation", "--outdir", root / "dist", root, cwd=root, status=0)
    (sdist,) = (root / "dist").glob("*.tar.gz")
    (wheel,) = (root / "dist").glob("*.whl")
    with tarfile.open(sdist) as tar:
        first = {member.name.partition("/")[2] for member in tar if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        second = set(archive.namelist())
    return first, second, wheel.name


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_built_from_and_nothing_else(built):
    names = {name for name in built[0] if not name.startswith("fastdeit.egg-info/")}
    expected = {str(path.relative_to(ROOT)) for path in sources()}
    assert names == expected | NEEDED | MADE | {"pipelines/loaders/jpeg.c"}


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_and_nothing_else(built):
    info = f"fastdeit-{__version__}.dist-info/"
    names = {name for name in built[1] if not name.startswith(info)}
    expected = set()
    for path in sources():
        top, *rest = path.relative_to(ROOT).parts
        expected.add("/".join((INSTALLED[top], *rest)))
    assert names - {LIBRARY} == expected
    assert {"fastdeit/py.typed", "fastdeit/kernels/py.typed", "fastdeit/pipelines/py.typed"} <= expected
    assert info + "licenses/LICENSE" in built[1]


@pytest.mark.slow
def test_one_wheel_serves_every_python_and_has_the_library_if_it_can_be_built_here(built):
    assert built[2].startswith(f"fastdeit-{__version__}-cp311-abi3-")
    try:
        find_turbo()
    except UserError:
        pytest.skip("libjpeg-turbo's headers or a C compiler are missing (make env)")
    assert LIBRARY in built[1]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2012.12877"
