"""What import-linter cannot look at: the channels know the author's door, and what two of them share, only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHANNELS = sorted(path for pattern in ("*.py", "aftertouch_*/*.py") for path in ROOT.glob(f"plugins/*/{pattern}"))
DOOR = {"aftertouch", "aftertouch.channels", "aftertouch.hookspecs", "aftertouch.http", "aftertouch_twilio"}


def list_imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", CHANNELS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_channel_imports_the_authors_door_only(path: Path) -> None:
    ours = {name for name in list_imports(path) if name.partition("_")[0].partition(".")[0] == "aftertouch"}
    assert {name for name in ours if name.partition(".")[0] != path.parent.name} <= DOOR


@pytest.mark.parametrize("name", ["channels", "hookspecs"])
def test_authors_door_needs_pydantic_and_pluggy_at_most(name: str) -> None:
    roots = {imported.partition(".")[0] for imported in list_imports(ROOT / "server" / "aftertouch" / f"{name}.py")}
    assert roots - sys.stdlib_module_names <= {"aftertouch", "pydantic", "pluggy"}
