"""The breaker: stops a campaign whose messages keep failing, before it writes everybody off.

People who are gone, said stop or are held by the provider do not count: a list is allowed to be old. What counts is what
happens to the campaign as a whole: content, senders and codes that nobody knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from aftertouch.channels import ReasonClass

LEAST_OUTCOMES = 200
"""Before that a share means nothing."""

MOST_DEFECTS = 3
"""Calls in a row in which the channel itself failed: its messages are unclear, and so would everybody's be who is left."""

_OF_THE_PERSON = frozenset({ReasonClass.RECIPIENT_GONE, ReasonClass.OPTED_OUT, ReasonClass.CAPPED})


@dataclass(frozen=True)
class BreakerSettings:
    """When a campaign is stopped; zero means never."""

    most_in_a_row: int = 100
    most_percent: int = 50


class Breaker:
    """What this process saw of one campaign since it was launched or resumed."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._in_a_row = 0
        self._failed = 0
        self._seen = 0
        self._defects = 0
        self._last_defect = ""

    def note_sent(self) -> None:
        """A message was taken."""
        self._in_a_row = 0
        self._seen += 1

    def note_call(self, defect: str) -> None:
        """The channel was called; ``defect`` is how it failed itself, empty when it did not."""
        self._defects = self._defects + 1 if defect else 0
        self._last_defect = defect

    def note_failed(self, reason_class: ReasonClass) -> None:
        """A person failed for good."""
        if reason_class in _OF_THE_PERSON:
            return
        self._in_a_row += 1
        self._seen += 1
        self._failed += 1

    def find_reason(self) -> str:
        """Why the campaign has to stop, for a person; empty when it may go on."""
        if self._defects >= MOST_DEFECTS:
            return (
                f"the channel itself failed {self._defects} times in a row: {self._last_defect}; the log tells more, "
                "whom it was handed is unclear; mend the plugin, then resume"
            )
        most, percent = self._settings.most_in_a_row, self._settings.most_percent
        if most and self._in_a_row >= most:
            return f"{self._in_a_row} messages in a row failed; see the reasons, mend the cause, then resume"
        if percent and self._seen >= LEAST_OUTCOMES and self._failed * 100 > percent * self._seen:
            return f"{self._failed} of the last {self._seen} messages failed; see the reasons, mend the cause, then resume"
        return ""
