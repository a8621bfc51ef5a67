"""What the pages for channel authors say is true: snippets are the example's own code, and the reference leaves nothing out."""

from __future__ import annotations

import enum
import importlib.util
import inspect
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from aftertouch import channels, hookspecs, testing
from aftertouch.testing._subject import Subject
from aftertouch.testing._webhooks import _read_request as read_request
from aftertouch.testing._webhooks import _write_webhook as write_webhook

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "plugins"
EXAMPLE = ROOT / "plugins" / "aftertouch-console"
SNIPPET = re.compile(r"<!-- from (?P<path>\S+)(?: (?P<name>\S+))? -->\n```\w+\n(?P<code>.*?)```", re.DOTALL)
MARKER = re.compile(r"\s*# --8<-- \[(start|end):(\w+)\]")


def cut_snippet(path: Path, name: str | None) -> str:
    """The lines between a file's markers, without the markers of others; the whole file where there is no name."""
    if name is None:
        return path.read_text()
    inside, lines = False, []
    for line in path.read_text().splitlines():
        if (marker := MARKER.match(line)) is None:
            lines += [line] if inside else []
        elif marker[2] == name:
            inside = marker[1] == "start"
    return textwrap.dedent("\n".join(lines)).strip() + "\n"


SNIPPETS = [
    pytest.param(match["path"], match["name"], match["code"], id=f"{page.stem}-{match['name'] or match['path']}")
    for page in sorted(PAGES.glob("*.md"))
    for match in SNIPPET.finditer(page.read_text())
]


@pytest.mark.parametrize(("path", "name", "code"), SNIPPETS)
def test_snippet_is_cut_from_the_example(path: str, name: str | None, code: str) -> None:
    assert code == cut_snippet(ROOT / path, name)


def test_snippets_show_every_marked_part() -> None:
    marked = {
        (str(path.relative_to(ROOT)), marker[2])
        for path in EXAMPLE.rglob("*.py")
        for marker in map(MARKER.match, path.read_text().splitlines())
        if marker
    }
    assert marked == {(param.values[0], param.values[1]) for param in SNIPPETS if param.values[1]}


def load_example() -> Subject:
    """What the example's contract says of its channel."""
    spec = importlib.util.spec_from_file_location("example_contract", EXAMPLE / "tests" / "test_console.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    contract: Subject = module.TestConsole()
    return contract


def test_every_other_block_is_run_somewhere() -> None:
    """The example's code is run by its own tests; what else is shown is run as it stands, or is the command of a test."""
    fence = re.compile(r"(?P<marker><!-- from [^\n]* -->\n)?^```(\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
    blocks = [match["code"] for page in sorted(PAGES.glob("*.md")) for match in fence.finditer(page.read_text())]
    shown = {code for code in blocks if code not in {param.values[2] for param in SNIPPETS}}
    (sample,) = [code for code in shown if code.startswith("{")]
    assert shown - {sample} == {
        'pip install ".[testing]"\n',  # tests/unit/test_contract.py: the contract in a foreign project
        "$ pytest\n",  # tests/e2e/test_author.py: a new channel keeps the contract
        'aftertouch channels test pager --to ada --content \'{"text": "Hello"}\'\n',  # the same, as it stands here
    }
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["testing"]
    channel = load_example().build()
    recorded = json.loads(sample)
    assert write_webhook(channel.parse(read_request(recorded["request"], channel))) == recorded["expect"]


def list_public() -> Iterator[tuple[str, type]]:
    for name, value in vars(channels).items():
        if inspect.isclass(value) and value.__module__ == channels.__name__ and not name.startswith("_"):
            yield name, value


def list_members(kind: type) -> set[str]:
    if issubclass(kind, enum.Enum):
        return {member.value for member in kind}
    own = {name for name, value in vars(kind).items() if callable(value) or isinstance(value, property | classmethod)}
    names = own | set(vars(kind).get("__annotations__", {}))
    return {name for name in names if not name.startswith(("_", "model_"))}


REFERENCE = (PAGES / "reference.md").read_text()
SECTIONS = {match[1]: match[2] for match in re.finditer(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", REFERENCE, re.DOTALL | re.MULTILINE)}


@pytest.mark.parametrize(("name", "kind"), list(list_public()))
def test_reference_describes_every_type_and_its_members(name: str, kind: type) -> None:
    assert name in SECTIONS
    told = set(re.findall(r"`(\w+)[^`]*`", SECTIONS[name]))
    assert list_members(kind) <= told


def test_reference_describes_the_outcome() -> None:
    told = set(re.findall(r"`(\w+)`", SECTIONS["Outcome"]))
    assert {kind.__name__ for kind in get_args(channels.Outcome)} <= told


def test_reference_describes_every_hook() -> None:
    hooks = {name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")}
    assert hooks
    assert hooks <= SECTIONS.keys()


def test_reference_describes_the_contract() -> None:
    assert set(testing.__all__) <= SECTIONS.keys()
    built = {"build", "make_address", "make_content", "make_messages", "find_leaks", "find_samples"}
    told = set(re.findall(r"`(\w+)[^`]*`", SECTIONS["ChannelContract"]))
    assert list_members(Subject) - built <= told
