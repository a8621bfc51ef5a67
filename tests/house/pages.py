"""What is made from the code, parts of pages and templates: write it again, or with ``--check`` say what is not current.

A part stands between ``<!-- made: name -->`` and ``<!-- end -->``; a snippet is the fence after ``<!-- from path name -->``, cut
from between that file's markers. So what is read was run by a test, and what is listed is what there is.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from aftertouch.config import Config, name_setting
from aftertouch.declarations import ChannelType
from aftertouch.plugins import discover_channels
from aftertouch.plugins import name_setting as name_channel_setting

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "settings.md")
EXAMPLE = "aftertouch-console"
"""Not listed: it exists to be copied, and the tutorial has its settings."""
_EXAMPLE_FILES = ROOT / "plugins" / EXAMPLE
TEMPLATES = {
    ROOT / "server" / "aftertouch" / "scaffold" / f"{name}.txt": _EXAMPLE_FILES / path
    for name, path in (
        ("pyproject.toml", "pyproject.toml"),
        ("channel.py", "aftertouch_console.py"),
        ("contract.py", "tests/test_console.py"),
    )
}
"""What `aftertouch channels new` writes, by what it is made from."""

_PART = re.compile(r"(?P<head><!-- made: (?P<name>[\w-]+) -->\n).*?(?P<tail><!-- end -->)", re.DOTALL)
_SNIPPET = re.compile(
    r"(?P<head><!-- from (?P<path>\S+) (?P<name>\S+) -->\n```\w+\n).*?(?P<tail>^```$)", re.DOTALL | re.MULTILINE
)


def list_channels() -> list[ChannelType]:
    """The channels of the house, without the example, and without what else may be installed."""
    ours = {path.name for path in (ROOT / "plugins").iterdir()} - {EXAMPLE}
    return [found for _, found in sorted(discover_channels().types.items()) if found.distribution in ours]


def make_settings() -> str:
    """The server's settings as a table."""
    return _make_table(Config, name_setting)


def make_channel_settings(channel: ChannelType) -> str:
    """One channel's settings as a table."""
    return _make_table(channel.channel.settings_model, lambda field: name_channel_setting(channel.name, field))


def make_channels() -> str:
    """Every action of every channel as a table."""
    lines = ["| channel | action | label | people of whom this is true | counted apart |", "|---|---|---|---|---|"]
    for channel in list_channels():
        for name, compiled in channel.actions.items():
            action = compiled.action
            apart = f"{action.apart_label}: `{action.apart}`" if action.apart else ""
            cells = [channel.name, f"`{name}`", action.label, f"`{action.expression}`", apart]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _make_table(model: type[BaseModel], name: Callable[[str], str]) -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for field, info in model.model_fields.items():
        meaning = " ".join((info.description or "").split()).replace("``", "`").replace("<", "&lt;")
        if get_origin(info.annotation) is Literal:
            meaning += ": " + ", ".join(f"`{choice}`" for choice in get_args(info.annotation))
        lines.append(f"| `{name(field)}` | {_show_default(info)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _show_default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "needed"
    return "" if info.default in (None, "", ()) else f"`{info.default}`"


def cut_snippet(path: Path, name: str) -> str:
    """The lines between a file's markers of this name."""
    marked = re.search(rf"# --8<-- \[start:{name}\]\n(.*?)[ ]*# --8<-- \[end:{name}\]", path.read_text(), re.DOTALL)
    if marked is None:
        raise LookupError(f"{path} has no part {name!r}")
    return textwrap.dedent(marked[1]).strip() + "\n"


def make_page(text: str) -> str:
    """The page with its parts and snippets as they should be."""
    parts = {"settings": make_settings, "channels": make_channels}
    for channel in list_channels():
        parts[f"settings-{channel.name}"] = lambda channel=channel: make_channel_settings(channel)
    text = _PART.sub(lambda match: f"{match['head']}\n{parts[match['name']]()}\n{match['tail']}", text)
    return _SNIPPET.sub(lambda match: f"{match['head']}{cut_snippet(ROOT / match['path'], match['name'])}{match['tail']}", text)


def make_template(path: Path) -> str:
    """A file of the example without the marks that snippets are cut by, and without what only the example has."""
    text = re.sub(r"^[ ]*# --8<--.*\n", "", path.read_text(), flags=re.MULTILINE)
    text = text.replace('    samples = "samples"\n', "").replace("The channel to copy: messages", "Console: messages")
    text = re.sub(r'description = ".*"', 'description = "Console as an Aftertouch channel."', text)
    # Two blank lines between what stands at the margin, one inside of it.
    text = re.sub(r"\n{3,}(?=[^ \n])", "\n\n\n", text)
    return re.sub(r"\n{3,}(?= )", "\n\n", text).rstrip() + "\n"


def find_stale() -> Iterator[tuple[Path, str]]:
    """The pages and templates that are not current, with what they should be."""
    made = {page: make_page(page.read_text()) for page in PAGES}
    made |= {target: make_template(source) for target, source in TEMPLATES.items()}
    for path, text in made.items():
        if not path.exists() or text != path.read_text():
            yield path, text


if __name__ == "__main__":
    stale = list(find_stale())
    if sys.argv[1:] == ["--check"]:
        sys.exit("\n".join(f"{page.relative_to(ROOT)} is not current; run `make docs`" for page, _ in stale) or None)
    for page, made in stale:
        page.write_text(made)
        print(f"wrote {page.relative_to(ROOT)}")
