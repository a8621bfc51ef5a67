"""The hooks that a plugin may implement, and the marker to implement them with.

pluggy only *discovers* channels: a hook call reaches every plugin and the first exception discards all
results, so sending through hooks would be wrong. After discovery one channel object is called directly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from aftertouch.channels import Channel

PROJECT = "aftertouch"
"""One word for the pluggy project, the entry-point group and the prefix of every hook."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def aftertouch_register_channels() -> Iterable[type[Channel]]:  # type: ignore[empty-body]
    """Name the channel classes that this distribution provides.

    Called once, when a command that needs channels starts. Do no I/O here: the server builds each class
    from its settings later, inside its event loop.

    Returns: the classes themselves, not instances. A class whose ``name`` another distribution already
    registered is refused and reported; the first one keeps working.
    """
