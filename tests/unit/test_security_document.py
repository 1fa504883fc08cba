"""SECURITY.md names tests for what it says: they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
#: Rows of the tables that make a claim: those with cells of code that look like a test, and those without.
TABLES = re.findall(r"(?:^\|.*\|\n)+", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_it_is_there(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    found = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    found |= {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    assert name in found


def test_every_threat_has_a_test() -> None:
    threats = [table for table in TABLES if "shown by" in table.splitlines()[0]]
    assert len(threats) == 5
    for table in threats:
        for row in table.splitlines()[2:]:
            assert re.search(r"`tests/[\w/]+\.py::\w+`", row.rpartition(" | ")[2]), row


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (ROOT / target).is_file(), target
