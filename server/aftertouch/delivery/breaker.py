"""The breaker: stops a campaign whose messages keep failing, before it writes everybody off.

People who are gone, said stop or are held by the provider do not count: a list is allowed to be old. What counts is what
happens to the campaign as a whole: content, senders and codes that nobody knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from aftertouch.channels import ReasonClass

LEAST_OUTCOMES = 200
"""Before that a share means nothing."""

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

    def note_sent(self) -> None:
        """A message was taken."""
        self._in_a_row = 0
        self._seen += 1

    def note_failed(self, reason_class: ReasonClass) -> None:
        """A person failed for good."""
        if reason_class in _OF_THE_PERSON:
            return
        self._in_a_row += 1
        self._seen += 1
        self._failed += 1

    def find_reason(self) -> str:
        """Why the campaign has to stop, for a person; empty when it may go on."""
        most, percent = self._settings.most_in_a_row, self._settings.most_percent
        if most and self._in_a_row >= most:
            return f"{self._in_a_row} messages in a row failed; see the reasons, mend the cause, then resume"
        if percent and self._seen >= LEAST_OUTCOMES and self._failed * 100 > percent * self._seen:
            return f"{self._failed} of the last {self._seen} messages failed; see the reasons, mend the cause, then resume"
        return ""
