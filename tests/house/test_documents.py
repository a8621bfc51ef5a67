"""What the documents say is true: parts are current, links lead somewhere, words are used, commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from aftertouch import cli
from aftertouch.config import Config, name_setting
from aftertouch.plugins import discover_channels
from aftertouch.plugins import name_setting as name_channel_setting

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")] + sorted(
    ROOT.glob("docs/**/*.md")
)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
README = (ROOT / "README.md").read_text()
OTHER_NAMES = {"AFTERTOUCH_API_KEY", "AFTERTOUCH_ADDRESS"}
"""What callers' journeys and `contacts import` read."""
GLOSSARY = re.findall(r"^\| \*\*([\w ]+)\*\* \|", README, re.MULTILINE)


def run_script(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tests" / "house" / name, "--check"], capture_output=True, text=True)


def name_anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("script", ["pages.py", "stubs.py"])
def test_what_is_made_from_the_code_is_current(script: str) -> None:
    checked = run_script(script)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in name_anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_are_mentioned_exist(page: Path) -> None:
    known = {name_setting(field) for field in Config.model_fields} | OTHER_NAMES
    for name, found in discover_channels().types.items():
        known |= {name_channel_setting(name, field) for field in found.channel.settings_model.model_fields}
    assert set(re.findall(r"\bAFTERTOUCH_[A-Z_]*[A-Z]\b", page.read_text())) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_of_make_that_are_mentioned_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = re.findall(r"(?:^|`)make ([\w./ -]+?)(?=`|  |$)", page.read_text(), re.MULTILINE)
    assert {target for targets_of_one in mentioned for target in targets_of_one.split()} <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_mentioned_exist(page: Path) -> None:
    commands = list_commands(typer.main.get_command(cli.app))
    for words in re.findall(r"(?:^ *|`|/bin/)aftertouch ([a-z]+(?: [a-z]+)?)\b", page.read_text(), re.MULTILINE):
        first = words.split()[0]
        assert words in commands or (first in commands and not commands[first]), words


def list_commands(group: Any, prefix: str = "") -> dict[str, bool]:
    """Every command by its words, and whether it needs another word after it."""
    found = {}
    for name, command in group.commands.items():
        below = list_commands(command, f"{prefix}{name} ") if hasattr(command, "commands") else {}
        found |= {f"{prefix}{name}": bool(below) and not command.invoke_without_command, **below}
    return found


def test_glossary_is_sorted_and_has_no_word_twice() -> None:
    assert sorted(set(GLOSSARY)) == GLOSSARY


@pytest.mark.parametrize("word", GLOSSARY)
def test_glossary_has_only_words_of_the_house(word: str) -> None:
    sources = [*ROOT.glob("protos/**/*.proto"), *ROOT.glob("server/aftertouch/**/*.py")]
    assert any(re.search(rf"\b{word}s?\b", path.read_text(), re.IGNORECASE) for path in sources)


@pytest.mark.parametrize(
    "word",
    "App Contact Roll Subscription Channel Campaign Signal Event Reason Action Audience Wave chain provider template attempt"
    " receipt position slot block kind lease token selection".lower().split(),
)
def test_glossary_explains(word: str) -> None:
    assert word in GLOSSARY


def test_changelog_has_unreleased_changes() -> None:
    unreleased = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", (ROOT / "CHANGELOG.md").read_text(), re.DOTALL | re.MULTILINE)
    assert unreleased is not None
    assert unreleased[1].strip()


def test_make_help_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    helped = subprocess.run(
        ["make", "--no-print-directory", "-C", ROOT, "help"], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^  make (\S+)", helped, re.MULTILINE) == re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    assert set(phony[1].split()) == set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
