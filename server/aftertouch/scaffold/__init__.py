"""The first files of a new channel: the example plugin under another name, which keeps the contract as it stands.

The templates beside this module are made from ``plugins/aftertouch-console`` by ``make docs``, so they are code that is tested.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_HERE = Path(__file__).parent


class ScaffoldRefused(Exception):
    """The files cannot be written; the text says why."""


def write_channel(name: str, directory: Path) -> list[Path]:
    """Write the distribution ``aftertouch-<name>`` below ``directory``, and return its files.

    Raises:
        ScaffoldRefused: the name is none for a channel, or there is such a directory already.
    """
    if not _NAME.fullmatch(name) or len(name) > 32:
        raise ScaffoldRefused(
            f"{name!r} is no name for a channel: a lower-case word of up to 32 letters, digits and single hyphens"
        )
    root = directory / f"aftertouch-{name}"
    module = f"aftertouch_{name.replace('-', '_')}"
    files = {
        root / "pyproject.toml": "pyproject.toml.txt",
        root / f"{module}.py": "channel.py.txt",
        root / "tests" / f"test_{name.replace('-', '_')}.py": "contract.py.txt",
    }
    try:
        root.mkdir(parents=True)
    except FileExistsError as error:
        raise ScaffoldRefused(f"{root} exists already") from error
    for path, template in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(rename_example((_HERE / template).read_text(), name))
    return list(files)


def rename_example(text: str, name: str) -> str:
    """The example's text as that of another channel."""
    words = name.split("-")
    for old, new in (
        ("aftertouch_console", f"aftertouch_{'_'.join(words)}"),
        ('label = "Console"', f'label = "{" ".join(words).capitalize()}"'),
        ("Console", "".join(word.capitalize() for word in words)),
        ("console =", f"{name} ="),
        ("console", name),
    ):
        text = text.replace(old, new)
    return text
