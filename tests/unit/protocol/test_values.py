"""Values are immutable to the type checker, and equal and hashable by what they hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tokenmq.protocol.messages import Cancel, Credit

ROOT = Path(__file__).parents[3]


def test_equal_values_are_one_key() -> None:
    assert {Cancel(b"i" * 16, 1): "a"}[Cancel(b"i" * 16, 1)] == "a"
    assert Cancel(b"i" * 16, 1) != Cancel(b"i" * 16, 2)
    assert not hasattr(Credit(b"i" * 16, 1, 5), "__dict__")


def test_the_type_checker_keeps_them_from_changing(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "tokenmq").mkdir()
    (tmp_path / "tokenmq" / "protocol").symlink_to(ROOT / "protocol")
    script = tmp_path / "change.py"
    script.write_text(
        "from tokenmq.protocol.messages import Cancel\nCancel(bytes(16), 1).attempt = 2\nCancel(bytes(16), 'x')\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path), str(script)],
        cwd=tmp_path,
        env={"MYPYPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert 'Property "attempt" defined in "Cancel" is read-only' in run.stdout, run.stdout + run.stderr
    assert 'expected "int"' in run.stdout
