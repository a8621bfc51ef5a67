"""The people behind the sandbox: who they are, which channels they have and what their browsers' keys are.

Everything is computed from the seed and a person's index, so ten people and ten million take the same memory.
"""

from __future__ import annotations

import csv
import hmac
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from .draws import draw_bytes, draw_numbers
from .settings import Shares

Channel = Literal["sms", "whatsapp", "push"]
CHANNELS: tuple[Channel, ...] = ("sms", "whatsapp", "push")

HEADER = (
    "external_id",
    "first_name",
    "time_zone",
    "sms.phone",
    "whatsapp.phone",
    "push.endpoint",
    "push.keys.p256dh",
    "push.keys.auth",
    "push.confirms",
)

# fmt: off
_FIRST_NAMES = (
    "Ann", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hiro", "Ines",
    "Jonas", "Karim", "Lucía", "Marco", "Nadia", "Omar", "Priya", "Quentin", "Rosa",
    "Sam", "Tariq", "Uma", "Victor", "Wanda", "Xavier", "Yara", "Zoë", "José",
    "Łukasz", "Søren", "Анна", "美咲", "Nguyễn", "D'Angelo", "Jean-Luc", "Ægir", "Χρύσα",
)
# fmt: on
_TIME_ZONES = (
    "Europe/Madrid",
    "Europe/London",
    "America/New_York",
    "America/Sao_Paulo",
    "Asia/Kolkata",
    "Asia/Tokyo",
    "Australia/Sydney",
    "Atlantic/Canary",
)

# Every number +34 6xx xxx xxx is a valid Spanish mobile. Not a +1 number: Meta delivers no marketing to those.
_PHONE_PREFIX = "+346"
_PHONES = 10**8
# Coprime to 10, so the step visits every number once and neighbours do not get neighbouring numbers.
_PHONE_STEP = 61_803_399
_PHONE_STEP_BACK = pow(_PHONE_STEP, -1, _PHONES)

_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_INDEX_BYTES = 6
_MAC_BYTES = 12
_BROWSER_NAME = re.compile(r"[A-Za-z0-9_-]{24}")


def encode_base64url(data: bytes) -> str:
    """Base64url without padding, as push keys are written."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True)
class Person:
    """One of the population."""

    index: int
    external_id: str
    first_name: str
    """Empty for some."""
    time_zone: str
    phone: str
    channels: frozenset[Channel]
    push_confirms: bool


class Population:
    """``size`` people; ``url`` is where their browsers' push service answers."""

    def __init__(self, seed: int, size: int, url: str, shares: Shares) -> None:
        if size > _PHONES:
            raise ValueError(f"a population has at most {_PHONES} people")
        self.seed = seed
        self.size = size
        self._url = url
        self._shares = shares
        self._mac_key = draw_bytes(seed, "endpoint")
        self._phone_offset = int.from_bytes(draw_bytes(seed, "phone")[:8], "big") % _PHONES

    def __iter__(self) -> Iterator[Person]:
        return map(self.get_person, range(self.size))

    def get_person(self, index: int) -> Person:
        """The person with this index."""
        draws = draw_numbers(self.seed, "person", index)
        digits = (index * _PHONE_STEP + self._phone_offset) % _PHONES
        return Person(
            index=index,
            external_id=f"user-{index:06d}",
            first_name="" if draws[0] < self._shares.no_first_name else _FIRST_NAMES[int(draws[1] * len(_FIRST_NAMES))],
            time_zone=_TIME_ZONES[int(draws[2] * len(_TIME_ZONES))],
            phone=f"{_PHONE_PREFIX}{digits:08d}",
            channels=self._choose_channels(draws[3], draws[4]),
            push_confirms=draws[5] >= self._shares.push_silent,
        )

    def _choose_channels(self, how_many: float, which: float) -> frozenset[Channel]:
        chosen = CHANNELS[int(which * len(CHANNELS))]
        if how_many < self._shares.all_channels:
            return frozenset(CHANNELS)
        if how_many < self._shares.all_channels + self._shares.two_channels:
            return frozenset(CHANNELS) - {chosen}
        return frozenset({chosen})

    def find_phone(self, phone: str) -> Person | None:
        """The person with this number, on whatever channel."""
        digits = phone.removeprefix(_PHONE_PREFIX)
        if len(digits) != 8 or len(phone) != len(_PHONE_PREFIX) + 8:
            return None
        index = (int(digits) - self._phone_offset) * _PHONE_STEP_BACK % _PHONES
        return self.get_person(index) if index < self.size else None

    def find_browser(self, name: str) -> Person | None:
        """The person whose endpoint ends in ``name``."""
        if not _BROWSER_NAME.fullmatch(name):
            return None
        index = int.from_bytes(urlsafe_b64decode(name)[:_INDEX_BYTES], "big")
        if index >= self.size or not hmac.compare_digest(name, self._name_browser(index)):
            return None
        person = self.get_person(index)
        return person if "push" in person.channels else None

    def get_endpoint(self, index: int) -> str:
        """The push endpoint of this person's browser."""
        return f"{self._url}/push/{self._name_browser(index)}"

    def _name_browser(self, index: int) -> str:
        number = index.to_bytes(_INDEX_BYTES, "big")
        return encode_base64url(number + hmac.digest(self._mac_key, number, "sha256")[:_MAC_BYTES])

    def derive_push_key(self, index: int) -> ec.EllipticCurvePrivateKey:
        """The private half of ``p256dh``, which only the browser knows."""
        number = int.from_bytes(draw_bytes(self.seed, "push key", index), "big") % (_P256_ORDER - 1) + 1
        return ec.derive_private_key(number, ec.SECP256R1())

    def derive_push_secret(self, index: int) -> bytes:
        """The ``auth`` secret of this person's subscription."""
        return draw_bytes(self.seed, "push secret", index)[:16]

    def list_rows(self) -> Iterator[dict[str, str]]:
        """Everybody as a row of a file of contacts; cells of channels that a person has not are empty."""
        for person in self:
            yield dict(zip(HEADER, self._list_cells(person), strict=True))

    def write_csv(self, path: Path) -> None:
        """Write ``list_rows`` as a file."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, HEADER)
            writer.writeheader()
            writer.writerows(self.list_rows())

    def _list_cells(self, person: Person) -> list[str]:
        cells = [
            person.external_id,
            person.first_name,
            person.time_zone,
            person.phone if "sms" in person.channels else "",
            person.phone if "whatsapp" in person.channels else "",
        ]
        if "push" not in person.channels:
            return cells + [""] * 4
        point = self.derive_push_key(person.index).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return [
            *cells,
            self.get_endpoint(person.index),
            encode_base64url(point),
            encode_base64url(self.derive_push_secret(person.index)),
            "true" if person.push_confirms else "false",
        ]
