"""When a draft is to be launched, as somebody chose it: kept with the draft until it is.

What cannot be read is kept as it was typed, so that a slip in a number never makes another choice of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from aftertouch.errors import FieldsInvalid, Violation
from aftertouch.v1 import campaigns_pb2

CHOICES: Mapping[str, tuple[str, ...]] = {
    "now": (),
    "later": ("schedule_time", "send_by_time"),
    "delay": ("delay", "send_by_time"),
}
"""What can be chosen, and the fields that are seen then."""
UNITS = {"days": timedelta(days=1), "hours": timedelta(hours=1), "minutes": timedelta(minutes=1), "seconds": timedelta(seconds=1)}
"""Longest first. Seconds are for a delay that was chosen by the API and is no number of minutes."""
LONGEST_DELAY = timedelta(days=366)
_TIMES = ("schedule_time", "send_by_time")


@dataclass(frozen=True)
class Plan:
    """Now, at a time, or so long after the source was sent; and until when."""

    when: str = "now"
    schedule_time: datetime | None = None
    delay: int = 24
    unit: str = "hours"
    send_by_time: datetime | None = None
    typed: Mapping[str, str] = field(default_factory=dict)
    """What is no time, or no number, by field."""

    @classmethod
    def read(cls, form: Mapping[str, Any]) -> Plan:
        """From the fields of a form."""
        when, unit, zone = (str(form.get(name, "")) for name in ("when", "delay_unit", "time_zone"))
        found: dict[str, Any] = {"when": when or cls.when, "unit": unit or cls.unit}
        typed: dict[str, str] = {}
        for name in ("delay", *_TIMES):
            text = str(form.get(name, "")).strip()
            try:
                if text:
                    found[name] = _read_time(text, zone) if name in _TIMES else _read_delay(text, found["unit"])
                elif name == when == "delay":
                    # An emptied field is none of what was in it.
                    typed[name] = text
            except (ValueError, OSError, OverflowError, KeyError):
                typed[name] = text
        return cls(**found, typed=typed)

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Plan:
        """As it was kept."""
        times = {name: datetime.fromisoformat(stored[name]) if stored[name] else None for name in _TIMES}
        typed = stored.get("typed", {})
        return cls(stored["when"], times["schedule_time"], stored["delay"], stored["unit"], times["send_by_time"], typed)

    @classmethod
    def wait_for(cls, delay: timedelta) -> Plan:
        """That of a follow-up."""
        unit = next(name for name, length in UNITS.items() if not delay % length)
        return cls("delay", delay=delay // UNITS[unit], unit=unit)

    def store(self) -> dict[str, Any]:
        """To be kept."""
        times = {"schedule_time": self.schedule_time, "send_by_time": self.send_by_time}
        kept = {name: time.isoformat() if time else "" for name, time in times.items()}
        return {"when": self.when, "delay": self.delay, "unit": self.unit, **kept, "typed": self.typed}

    @property
    def violations(self) -> list[Violation]:
        """What cannot be read of what was chosen."""
        if self.when not in CHOICES or self.unit not in UNITS:
            return [Violation("when", "choose when")]
        faults = dict.fromkeys(_TIMES, "is not a date and time") | {"delay": "must be a whole number, and no more than a year"}
        return [Violation(name, faults[name]) for name in CHOICES[self.when] if name in self.typed]

    @property
    def deadline(self) -> datetime | None:
        """Until when to send, where that can be chosen: what was chosen before for a launch at a time is kept, and not seen."""
        return self.send_by_time if "send_by_time" in CHOICES[self.when] else None

    def check(self) -> None:
        """Raise ``FieldsInvalid`` when something cannot be read, or no time was chosen."""
        if self.violations:
            raise FieldsInvalid(self.violations)
        if self.when == "later" and self.schedule_time is None:
            raise FieldsInvalid([Violation("schedule_time", "choose a time")])

    @property
    def wait(self) -> timedelta:
        """The delay, where it can be read."""
        return self.delay * UNITS[self.unit]

    def find_time(self, finish_time: datetime) -> datetime | None:
        """When that is, of a wave; None for at once.

        Args:
            finish_time: the end of the source's sending.

        Raises:
            FieldsInvalid: what ``check`` raises.
        """
        self.check()
        match self.when:
            case "later":
                return self.schedule_time
            case "delay":
                return finish_time + self.wait
            case _:
                return None

    def fill(self, request: campaigns_pb2.LaunchCampaignRequest) -> None:
        """Have a launch be then.

        Raises:
            FieldsInvalid: what ``check`` raises.
        """
        self.check()
        if self.when == "later" and self.schedule_time is not None:
            request.schedule_time.FromDatetime(self.schedule_time)
        if self.when == "delay":
            request.delay.FromTimedelta(self.wait)
        if self.deadline is not None:
            request.send_by_time.FromDatetime(self.deadline)


def _read_delay(text: str, unit: str) -> int:
    """A number of units.

    Raises:
        ValueError, KeyError: it is none, or too many; or there is no such unit.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and int(text) * UNITS[unit] <= LONGEST_DELAY):
        raise ValueError(text)
    return int(text)


def _read_time(text: str, zone: str) -> datetime:
    """A time that was chosen in the viewer's zone, which the page's script names; in UTC without it.

    Raises:
        ValueError, OSError, OverflowError, KeyError: it is no time, or there is no such zone.
    """
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone or "UTC")).astimezone(UTC)
