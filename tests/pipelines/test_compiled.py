"""Compiled code on disk must not outlive any file that was compiled into it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from fastdeit.pipelines.host import compiled


def run(folder: Path) -> tuple[int, int]:
    """The value that the compiled function returns, and how many compilations it took from the cache."""
    program = "from host.outer import outer; print(outer(1), sum(outer.stats.cache_hits.values()))"
    out = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    value, hits = out.stdout.split()
    return int(value), int(hits)


def test_a_change_in_another_file_is_seen_and_no_change_is_not_compiled_again(tmp_path):
    host = tmp_path / "host"
    host.mkdir()
    shutil.copy(compiled.__file__, host / "compiled.py")
    for name in ("host/__init__.py", "philox.py", "plan.py"):
        (tmp_path / name).write_text("")
    head = "from host.compiled import compiled\n"
    inner = head + "@compiled\ndef inner(x):\n    return x + {}\n"
    (host / "outer.py").write_text(
        head + "from host.inner import inner\n@compiled\ndef outer(x):\n    return inner(x)\n"
    )
    (host / "inner.py").write_text(inner.format(1))
    assert run(tmp_path) == (2, 0)
    assert run(tmp_path) == (2, 1)
    (host / "inner.py").write_text(inner.format(5))
    assert run(tmp_path) == (6, 0)
