"""What really happened: every message that the sandbox took or refused for a person's sake, and what it decided about it.

Kept apart from what was reported, so that a server's counts can be held against it: a signal is true here as soon as it is
decided, and ``acknowledged`` once the server has answered for it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .population import Channel, Person

_LABEL_LENGTH = 60


@dataclass(slots=True)
class Decision:
    """A signal that is true of a message."""

    code: str | None = None
    acknowledged: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """One message, as often as it was handed over: a second copy is a second entry."""

    sequence: int
    channel: Channel
    address: str
    person: Person | None
    token: str
    message_id: str
    label: str
    """The same for all copies of a campaign: a digest and the start of the text or the template's name."""
    content: Any
    refused: str | None
    """The code of the refusal; None when the message was taken."""
    signals: dict[str, Decision] = field(default_factory=dict)


class Truth:
    """All entries since the last reset, in the order in which they came."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything; sequence numbers begin at 1 again."""
        self.entries: list[Entry] = []
        self._copies: Counter[tuple[str, str, str]] = Counter()
        self._ordinals: dict[tuple[str, str, str], int] = {}
        self._messages: Counter[tuple[str, str]] = Counter()

    def count_earlier(self, channel: Channel, address: str, token: str) -> int:
        """How many other messages the address got before this one; a repeated token is the same message, with the same fate."""
        if token and (ordinal := self._ordinals.get((channel, address, token))) is not None:
            return ordinal
        ordinal = self._messages[channel, address]
        self._messages[channel, address] += 1
        self._ordinals[channel, address, token] = ordinal
        return ordinal

    def record(
        self,
        channel: Channel,
        address: str,
        person: Person | None,
        *,
        token: str = "",
        message_id: str = "",
        title: str = "",
        content: Any = None,
        refused: str | None = None,
    ) -> Entry:
        """Keep a message; ``title`` is what people would know it by."""
        entry = Entry(
            sequence=len(self.entries) + 1,
            channel=channel,
            address=address,
            person=person,
            token=token,
            message_id=message_id,
            label=_label_message(title, token, person),
            content=content,
            refused=refused,
        )
        self.entries.append(entry)
        if refused is None:
            self._copies[channel, address, token] += 1
        return entry

    def describe(self, *, channel: str | None, token_prefix: str, since: int) -> Iterator[str]:
        """The entries after sequence number ``since``, each as a line of JSON."""
        for entry in self.entries[since:]:
            if (channel is None or entry.channel == channel) and entry.token.startswith(token_prefix):
                yield json.dumps(self._describe_entry(entry), ensure_ascii=False) + "\n"

    def _describe_entry(self, entry: Entry) -> dict[str, Any]:
        return {
            "sequence": entry.sequence,
            "channel": entry.channel,
            "address": entry.address,
            "external_id": entry.person.external_id if entry.person else None,
            "token": entry.token,
            "message_id": entry.message_id,
            "label": entry.label,
            "content": entry.content,
            "refused": entry.refused,
            "taken": self._copies[entry.channel, entry.address, entry.token],
            "signals": {
                name: {"code": decision.code, "acknowledged": decision.acknowledged} for name, decision in entry.signals.items()
            },
        }

    def count(self) -> dict[str, Any]:
        """Totals per channel. ``repeated`` are copies beyond the first of the same token to the same address."""
        taken: Counter[str] = Counter()
        repeated: Counter[str] = Counter()
        refused: dict[str, Counter[str]] = {}
        signals: dict[str, Counter[str]] = {}
        for entry in self.entries:
            if entry.refused is None:
                taken[entry.channel] += 1
            else:
                refused.setdefault(entry.channel, Counter())[entry.refused] += 1
            signals.setdefault(entry.channel, Counter()).update(entry.signals.keys())
        for (channel, _, token), copies in self._copies.items():
            if token:
                repeated[channel] += copies - 1
        return {"last_sequence": len(self.entries), "taken": taken, "repeated": repeated, "refused": refused, "signals": signals}


def _label_message(title: str, token: str, person: Person | None) -> str:
    """Take out what differs from person to person before the digest: the token in a tracked link, and the first name."""
    if token:
        title = title.replace(token, "{token}")
    if person and person.first_name:
        title = title.replace(person.first_name, "{first_name}")
    return f"{hashlib.sha256(title.encode()).hexdigest()[:12]} {title[:_LABEL_LENGTH]}"
