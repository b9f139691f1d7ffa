"""The doctor tells what the environment is, as Python's packaging metadata and the operating system see it."""

import ctypes
import errno
import importlib
import importlib.metadata
import json
import os
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from numba.core import caching

from fastdeit.commands import doctor, doctor_checks
from fastdeit.commands.doctor_checks import Check
from fastdeit.pipelines import jit
from system import refusing, run_python


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site-packages folder, first on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def install(site, name, version, files):
    """A package as pip leaves it: its files and its metadata. Importing it is an error."""
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("raise RuntimeError('imported')\n")
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def report():
    """The command's own JSON and exit status, from a process of its own."""
    done = run_python("-m", "fastdeit.commands.doctor", "--json", timeout=120)
    return json.loads(done.stdout), done.returncode


@pytest.mark.slow
def test_the_command_agrees_with_the_environment(report):
    found, status = report
    assert (status, found["can_train"]) == (0, True)
    by_name = {check["name"]: check for check in found["checks"]}
    for line in importlib.metadata.requires("fastdeit"):
        if "extra" not in line:
            name = re.match(r"[\w-]+", line)[0]
            assert by_name[name]["status"] == "ok"
            assert by_name[name]["detail"].startswith(importlib.metadata.version(name))
    assert by_name["cpu"]["detail"].startswith(f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} ")
    cards = [name for name in by_name if re.fullmatch(r"gpu \d+", name)]
    assert len(cards) == torch.cuda.device_count()


@pytest.mark.slow
def test_ffcv_is_told_as_it_is(report):
    by_name = {check["name"]: check for check in report[0]["checks"]}
    try:
        version = importlib.metadata.version("ffcv")
    except importlib.metadata.PackageNotFoundError:
        assert by_name["ffcv"]["status"] == "absent"
    else:
        assert by_name["ffcv"]["detail"].startswith(version)


def test_the_table_names_every_check_and_fits_the_terminal(capsys):
    checks = [Check("short", "ok", "1.0"), Check("a-longer-name", "fail", "word " * 40, "pip install 'x>=1'")]
    text = doctor.render(checks, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "a-longer-name" in text
    assert "-> pip install 'x>=1'" in text


def test_a_failed_check_means_exit_status_one(monkeypatch, ended):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: doctor_checks.dependency("no-such-package-anywhere", "1.2"),))
    printed = ended(1, doctor.main, []).out
    assert "pip install 'no-such-package-anywhere>=1.2'" in printed
    assert "not possible here: see no-such-package-anywhere" in printed


def test_a_check_that_breaks_hides_no_other(monkeypatch):
    broken = Mock(side_effect=OSError("no such device"), __name__="broken")
    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor_checks.cpu))
    first, second = doctor.examine()
    assert (first.status, second.name) == ("warn", "cpu")
    assert "no such device" in first.detail


def test_an_old_package_fails():
    assert doctor_checks.dependency("numpy", "99.0").status == "fail"
    assert "too old" in doctor_checks.dependency("numpy", "99.0").detail


def test_a_package_that_does_not_import_fails(site):
    install(site, "hollow", "2.0", ["hollow.py"])
    check = doctor_checks.dependency("hollow", "1.0")
    assert check.status == "fail"
    assert "RuntimeError: imported" in check.detail


def test_without_apex_nothing_is_wrong():
    if importlib.util.find_spec("apex") is None:
        assert doctor_checks.apex().status == "absent"


def test_apex_of_pypi_is_told_apart_and_not_imported(site):
    install(site, "apex", "0.9.10.dev0", ["apex/__init__.py", "apex/views.py", "apex/forms.py", "apex/ext/__init__.py"])
    check = doctor_checks.apex()
    assert check.status == "warn"
    assert "0.9.10.dev0" in check.detail
    assert "not NVIDIA's" in check.detail
    assert "pip uninstall apex" in check.remedy


@pytest.mark.parametrize(("extensions", "status"), [([], "warn"), (["amp_C.py"], "ok")])
def test_apex_of_nvidia_with_and_without_its_extensions(site, extensions, status):
    install(site, "apex", "0.1", ["apex/__init__.py", "apex/optimizers/fused_adam.py", *extensions])
    check = doctor_checks.apex()
    assert check.status == status
    assert check.detail.startswith("NVIDIA's, 0.1")


def driver(monkeypatch, cuda):
    """A machine whose driver runs CUDA up to `cuda`, (major, minor), or that has none."""

    def version(pointer):
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = cuda[0] * 1000 + cuda[1] * 10
        return 0

    library = OSError("libcuda.so.1: cannot open") if cuda is None else SimpleNamespace(cuDriverGetVersion=version)
    monkeypatch.setattr(doctor_checks, "_load", lambda name: library)


@pytest.mark.parametrize(
    ("cuda", "packages", "status", "remedy"),
    [
        ((12, 8), ["nvidia-dali-cuda120"], "ok", ""),
        ((13, 0), ["nvidia-dali-cuda120"], "ok", ""),
        ((12, 8), ["nvidia-dali-cuda130"], "warn", "pip uninstall nvidia-dali-cuda130; pip install 'fastdeit[dali]'"),
        ((13, 0), ["nvidia-dali-cuda120", "nvidia-dali-cuda130"], "warn", "pip uninstall nvidia-dali-cuda1"),
        (None, ["nvidia-dali-cuda120"], "ok", ""),
        ((13, 0), [], "absent", "pip install 'fastdeit[dali-cuda13]'"),
    ],
)
def test_dali_must_fit_the_driver(site, monkeypatch, cuda, packages, status, remedy):
    monkeypatch.setattr(sys, "path", [str(site)])
    for package in packages:
        install(site, package, "1.51.0", [])
    driver(monkeypatch, cuda)
    check = doctor_checks.dali()
    assert check.status == status
    assert check.remedy.startswith(remedy)


def test_a_driver_older_than_pytorch_is_named(monkeypatch):
    if torch.cuda.is_available() or torch.version.cuda is None:
        pytest.skip("needs a CUDA build of PyTorch on a machine without a GPU")
    driver(monkeypatch, (11, 4))
    (check,) = doctor_checks.gpus()
    assert check.status == "warn"
    assert "CUDA up to 11.4" in check.detail
    assert "update the driver" in check.remedy


def test_a_library_that_is_not_there_is_an_error_not_a_crash():
    assert isinstance(doctor_checks._load("libsurely-not-there.so.7"), OSError)


def test_compiled_code_is_tried_not_looked_at(monkeypatch, tmp_path):
    assert doctor_checks.compiled_code().status == "ok"
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    monkeypatch.setattr(jit.tempfile, "tempdir", str(tmp_path))
    jit._own_folder.cache_clear()
    jit._say_once.cache_clear()
    try:
        kept = doctor_checks.compiled_code()
        jit._own_folder.cache_clear()
        monkeypatch.setattr(jit.tempfile, "tempdir", str(tmp_path / "missing"))
        lost = doctor_checks.compiled_code()
    finally:
        jit._own_folder.cache_clear()
        jit._say_once.cache_clear()
    assert (kept.status, lost.status) == ("warn", "warn")
    assert str(tmp_path) in kept.detail
    assert "every process compiles again" in lost.detail
    assert "NUMBA_CACHE_DIR" in lost.remedy


def test_shared_memory_is_written_not_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_checks.tempfile, "TemporaryFile", refusing(errno.ENOSPC))
    check = doctor_checks.shared_memory(tmp_path)
    assert check.status == "warn"
    assert "No space left on device" in check.detail
