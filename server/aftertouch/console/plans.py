"""When a draft is to be launched, as somebody chose it: kept with the draft until it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from aftertouch.errors import FieldsInvalid, Violation

CHOICES = ("now", "later", "delay")
UNITS = {"minutes": timedelta(minutes=1), "hours": timedelta(hours=1), "days": timedelta(days=1)}
LONGEST_DELAY = timedelta(days=366)


@dataclass(frozen=True)
class Plan:
    """Now, at a time, or so long after the source was sent; and until when."""

    when: str = "now"
    schedule_time: datetime | None = None
    delay: int = 24
    unit: str = "hours"
    send_by_time: datetime | None = None

    @classmethod
    def read(cls, form: Mapping[str, Any]) -> Plan:
        """From the fields of a form.

        Raises:
            FieldsInvalid: something is no time, or no number.
        """
        when, unit = str(form.get("when", "now")), str(form.get("delay_unit", "hours"))
        text = str(form.get("delay", "")).strip() or "24"
        if when not in CHOICES or unit not in UNITS:
            raise FieldsInvalid([Violation("when", "choose when")])
        if not (text.isascii() and text.isdecimal() and len(text) < 7 and int(text) * UNITS[unit] <= LONGEST_DELAY):
            raise FieldsInvalid([Violation("delay", "must be a whole number, and no more than a year")])
        times = {name: _read_time(form, name) for name in ("schedule_time", "send_by_time")}
        return cls(when, times["schedule_time"], int(text), unit, times["send_by_time"])

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Plan:
        """As it was kept."""
        times = {
            name: datetime.fromisoformat(stored[name]) if stored[name] else None for name in ("schedule_time", "send_by_time")
        }
        return cls(stored["when"], times["schedule_time"], stored["delay"], stored["unit"], times["send_by_time"])

    def store(self) -> dict[str, Any]:
        """To be kept."""
        times = {"schedule_time": self.schedule_time, "send_by_time": self.send_by_time}
        kept = {name: time.isoformat() if time else "" for name, time in times.items()}
        return {"when": self.when, "delay": self.delay, "unit": self.unit, **kept}

    def find_time(self, finish_time: datetime | None) -> datetime | None:
        """When to launch; None for at once.

        Args:
            finish_time: the end of the source's sending, of a wave.

        Raises:
            FieldsInvalid: no time was chosen, or the source is still being sent, so nobody knows when the delay is over.
        """
        match self.when:
            case "later":
                if self.schedule_time is None:
                    raise FieldsInvalid([Violation("schedule_time", "choose a time")])
                return self.schedule_time
            case "delay":
                if finish_time is None:
                    raise FieldsInvalid([Violation("delay", "is counted from when the source was sent, which is not over yet")])
                time = finish_time + self.delay * UNITS[self.unit]
                return time if time > datetime.now(UTC) else None
            case _:
                return None


def _read_time(form: Mapping[str, Any], name: str) -> datetime | None:
    """A time that was chosen in the viewer's zone, which the page's script names; in UTC without it.

    Raises:
        FieldsInvalid: it is no time.
    """
    text = str(form.get(name, ""))
    if not text:
        return None
    try:
        zone = ZoneInfo(str(form.get("time_zone", "")) or "UTC")
        return datetime.fromisoformat(text).replace(tzinfo=zone).astimezone(UTC)
    except (ValueError, OSError, OverflowError, ZoneInfoNotFoundError) as error:
        raise FieldsInvalid([Violation(name, "is not a date and time")]) from error
