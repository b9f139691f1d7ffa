"""Compiled code on disk must not outlive any file that was compiled into it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeit.pipelines import compiled


def run(folder: Path) -> tuple[int, int]:
    """The value that the compiled function returns, and how many compilations it took from the cache."""
    program = "from package.outer import outer; print(outer(1), sum(outer.stats.cache_hits.values()))"
    out = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    value, hits = out.stdout.split()
    return int(value), int(hits)


@pytest.mark.parametrize("changed", ["host/inner.py", "outer.py"])
def test_a_change_in_any_file_is_seen_and_no_change_is_not_compiled_again(tmp_path, changed):
    package = tmp_path / "package"
    (package / "host").mkdir(parents=True)
    shutil.copy(compiled.__file__, package / "compiled.py")
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
