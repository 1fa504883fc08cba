"""What `make lint` says of vulnerabilities: a known one fails it, a service out of reach does not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
FOUND = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}


def package(name: str, *vulnerabilities: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": list(vulnerabilities), **more}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tokenmq_audit", SCRIPTS / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("packages", "ignored", "code", "words"),
    [
        ([package("a"), package("b")], {}, 0, "audit: 2 packages, 0 vulnerabilities"),
        ([package("a", FOUND)], {}, 1, "a 1.0: PYSEC-1, CVE-1; fixed in 2.0"),
        ([package("a", {"id": "X"})], {}, 1, "fixed in no version yet"),
        ([package("a", FOUND)], {"CVE-1": "we do not call it"}, 0, "ignored, we do not call it"),
        ([package("a", FOUND, {"id": "X"})], {"CVE-1": "no"}, 1, "1 vulnerabilities that nobody has judged"),
        ([package("a")], {"CVE-1": "no"}, 0, "CVE-1 was not found: take it off"),
        ([package("a"), {"name": "b", "skip_reason": "gone"}], {}, 0, "1 packages are unknown to the service"),
        ([{"name": "b", "skip_reason": "Dependency not found on PyPI"}], {}, 0, "skipped, nothing was audited"),
        ([], {}, 0, "skipped, nothing was audited"),
    ],
)
def test_judgement(audit: ModuleType, packages: Any, ignored: dict[str, str], code: int, words: str) -> None:
    found, lines = audit.judge({"dependencies": packages}, ignored)
    assert found == code
    assert words in "\n".join(lines)


def test_no_report_is_no_failure(audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ignore").write_text("")
    (tmp_path / "log").write_text("Traceback\nConnectionError: no route to the service\n")
    assert audit.main(str(tmp_path / "none"), str(tmp_path / "ignore"), str(tmp_path / "log"), "1") == 0
    assert capsys.readouterr().out == (
        "audit: skipped, nothing was audited: ConnectionError: no route to the service\n"
    )


def test_a_reason_is_needed(audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.read_ignored("# why\n\nCVE-1 not called by us\n") == {"CVE-1": "not called by us"}
    (tmp_path / "report").write_text(json.dumps({"dependencies": [package("a")]}))
    (tmp_path / "ignore").write_text("CVE-1\n")
    (tmp_path / "log").write_text("")
    assert audit.main(str(tmp_path / "report"), str(tmp_path / "ignore"), str(tmp_path / "log"), "0") == 1
    assert "line 1: CVE-1 is ignored without a reason" in capsys.readouterr().out


def test_our_list_can_be_read(audit: ModuleType) -> None:
    assert all(audit.read_ignored((SCRIPTS / "audit-ignore.txt").read_text()).values()) is True


def test_without_pip_audit_it_is_skipped(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run([SCRIPTS / "audit.sh", python], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("audit: skipped, pip-audit is not installed")


@pytest.mark.parametrize(("vulnerable", "code"), [(True, 1), (False, 0)])
def test_the_script_hands_on_what_pip_audit_finds(tmp_path: Path, vulnerable: bool, code: int) -> None:
    """With a stand-in for python: it is asked for the packages, runs pip-audit, and then is the real one."""
    report = json.dumps({"dependencies": [package("a", *([FOUND] if vulnerable else []))]})
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
case "$*" in
    "-c import pip_audit") ;;
    "-m pip freeze"*) printf 'torch==2.13.0+cpu\\na==1.0\\n-e somewhere\\nb @ file:///b\\n' ;;
    "-m pip_audit"*)
        [ "$(cat "$4")" = "$(printf 'torch==2.13.0\\na==1.0')" ] || exit 9
        while [ "$1" != --output ]; do shift; done
        echo '{report}' >"$2"
        exit {code} ;;
    *) exec python3 "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    done = subprocess.run([SCRIPTS / "audit.sh", python], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done
    assert f"audit: 1 packages, {int(vulnerable)} vulnerabilities" in done.stdout
