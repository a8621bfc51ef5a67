"""What an event is placed by: launched campaigns, contact numbers, rolls, kinds. None of it ever changes, so it is kept at hand.

Each is bounded; what was used least recently is dropped first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.rolls.chunks import Numbers
from aftertouch.rolls.sql import read_roll
from aftertouch.store.campaigns import Campaign, find_campaigns, read_campaigns
from aftertouch.store.contacts import find_numbers
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind, intern_kinds

MOST_CAMPAIGNS = 10_000
MOST_IDENTITIES = 2_000_000
"""Contact numbers by external_id: about 150 bytes each, so 300 MB at the most."""
MOST_ROLL_POSITIONS = 25_000_000
"""Of decoded rolls: 8 bytes each, so 200 MB."""
MOST_KINDS = 10_000
"""Distinct signals with reasons; a code beyond them is stored as "other", so that nobody can flood the table."""

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """A bounded mapping that forgets what was used least recently."""

    def __init__(self, most: int, weigh: Callable[[V], int] = lambda _: 1) -> None:
        self._most = most
        self._weigh = weigh
        self._weight = 0
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """What is kept under the key."""
        if (value := self._items.get(key)) is not None:
            self._items.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Keep it, and drop others for it."""
        if key not in self._items:
            self._weight += self._weigh(value)
        self._items[key] = value
        while self._weight > self._most and len(self._items) > 1:
            _, dropped = self._items.popitem(last=False)
            self._weight -= self._weigh(dropped)


class Lookups:
    """Look-ups in the database, remembered."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._campaigns: Kept[int, Campaign] = Kept(MOST_CAMPAIGNS)
        self._campaigns_by_name: Kept[tuple[int, str], Campaign] = Kept(MOST_CAMPAIGNS)
        self._identities: dict[int, dict[bytes, int]] = {}
        self._rolls: Kept[int, Numbers] = Kept(MOST_ROLL_POSITIONS, len)
        self._kinds: dict[Kind, int] = {}

    def remember(self, campaign: Campaign) -> None:
        """Keep a campaign that was launched."""
        self._campaigns.put(campaign.campaign_id, campaign)
        self._campaigns_by_name.put((campaign.app_id, campaign.campaign), campaign)

    async def read_launched(self, campaign_ids: Iterable[int]) -> dict[int, Campaign]:
        """Those of these campaigns that were launched."""
        wanted = set(campaign_ids)
        found = {key: campaign for key in wanted if (campaign := self._campaigns.get(key))}
        if missing := list(wanted - found.keys()):
            async with transaction(self._engine) as conn:
                read = await read_campaigns(conn, missing)
            for key, campaign in read.items():
                if campaign.launch_time:
                    self.remember(campaign)
                    found[key] = campaign
        return found

    async def find_launched(self, app_id: int, names: Iterable[str]) -> dict[str, Campaign]:
        """Those of an app's campaigns of these ids that were launched."""
        wanted = set(names)
        found = {name: campaign for name in wanted if (campaign := self._campaigns_by_name.get((app_id, name)))}
        if missing := list(wanted - found.keys()):
            async with transaction(self._engine) as conn:
                read = await find_campaigns(conn, app_id, missing)
            for name, campaign in read.items():
                if campaign.launch_time:
                    self.remember(campaign)
                    found[name] = campaign
        return found

    async def find_numbers(self, app_id: int, external_ids: Sequence[bytes]) -> Numbers:
        """The contact number of each external_id, in UTF-8; -1 where there is none."""
        known = self._identities.setdefault(app_id, {})
        numbers = np.array([known.get(external_id, -1) for external_id in external_ids], np.int64)
        unknown = np.flatnonzero(numbers < 0).tolist()
        if unknown:
            wanted = {external_ids[index] for index in unknown}
            texts = [text for text in (external_id.decode(errors="replace") for external_id in wanted) if "\0" not in text]
            async with transaction(self._engine) as conn:
                read = {text.encode(): number for text, number in (await find_numbers(conn, app_id, texts)).items()}
            if sum(map(len, self._identities.values())) + len(read) > MOST_IDENTITIES:
                known = {}
                self._identities = {app_id: known}
            known.update(read)
            numbers[unknown] = [read.get(external_ids[index], -1) for index in unknown]
        return numbers

    async def read_roll(self, campaign_id: int) -> Numbers:
        """The contact numbers of a launched campaign, by position."""
        if (roll := self._rolls.get(campaign_id)) is None:
            async with transaction(self._engine) as conn:
                roll = await read_roll(conn, campaign_id)
            self._rolls.put(campaign_id, roll)
        return roll

    async def number_kinds(self, wanted: Iterable[Kind]) -> Mapping[Kind, int]:
        """The numbers of kinds, these among them, made where they are new."""
        if not self._kinds.keys() >= set(wanted):
            async with transaction(self._engine) as conn:
                self._kinds |= await intern_kinds(conn, set(wanted))
        return self._kinds

    def bound_kind(self, kind: Kind) -> Kind:
        """The kind itself, or the one for the rest of its class when there are too many."""
        if kind in self._kinds or len(self._kinds) < MOST_KINDS or not kind.reason_class:
            return kind
        return Kind(kind.signal, kind.reason_class, "other")
