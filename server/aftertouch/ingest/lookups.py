"""What an event is placed by: launched campaigns, contact numbers, rolls, kinds. It never changes, so it is kept at hand.

Only contacts that are erased are forgotten again.

Each is bounded, over all apps together; what was used least recently is dropped first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.errors import DatabaseUnavailable
from aftertouch.ingest.identities import ExternalIds, Identities, measure_table
from aftertouch.kept import Kept
from aftertouch.rolls.chunks import Numbers, Roll
from aftertouch.rolls.sql import read_roll
from aftertouch.store.campaigns import Campaign, find_campaigns, read_campaigns
from aftertouch.store.contacts import count_contacts, find_numbers, page_numbers
from aftertouch.store.engine import transaction
from aftertouch.store.erasures import list_erased
from aftertouch.store.kinds import MOST_KINDS, Kind, intern_kinds

MOST_CAMPAIGN_BYTES = 20_000_000
"""10,000 campaigns without tracked links."""
CAMPAIGN_BYTES = 2_000
"""That one takes beside its links."""
MOST_IDENTITY_BYTES = 384 << 20
"""Contact numbers by external_id: three apps of a million contacts, or one of two million, which may take half of it."""
IDENTITIES_PAGE = 20_000
"""Read at a time, so that nobody else waits longer than 10 ms."""
FORGET_SECONDS = 1.0
"""Between two looks at who was erased: until then events by an erased name still count for the number that is nobody any more."""
LONGEST_ERASING = timedelta(minutes=10)
"""From an erasure's time, when its transaction begins, to its commit."""
MOST_ROLL_BYTES = 350_000_000
"""Decoded rolls, 14 bytes a position at the most: 25 million positions. A single one that is larger is kept alone."""


@dataclass
class _Contacts:
    """What is known of one app's contacts."""

    most_bytes: int
    known: Identities = field(default_factory=Identities)
    misses: int = 0
    is_settled: bool = False
    """All were read once, or they are too many to be kept; whoever is not known is looked up."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    erased: Numbers = field(default_factory=lambda: np.empty(0, np.int64))
    """Those of late, whom a look-up that was under way may still bring."""
    seen_time: float = field(default_factory=time.monotonic)
    """Up to when it is known who was erased."""
    next_look: float = 0.0

    def learn(self, external_ids: ExternalIds, numbers: Numbers) -> None:
        """Keep what was read, without those who were erased meanwhile; where that is too much, nothing of all that is known."""
        is_gone = np.isin(numbers, self.erased)
        if is_gone.any():
            kept = np.flatnonzero(~is_gone)
            external_ids, numbers = external_ids.select(kept), numbers[kept]
        if self.known.measure(len(numbers)) > self.most_bytes:
            self.known, self.is_settled = Identities(), True
        else:
            self.known.add(external_ids, numbers)

    def forget(self, erased: Numbers) -> None:
        """Know those no more who were erased."""
        if len(new := np.setdiff1d(erased, self.erased)):
            self.known.forget(new)
        self.erased = erased


class Lookups:
    """Look-ups in the database, remembered."""

    def __init__(
        self, engine: AsyncEngine, *, most_identity_bytes: int = MOST_IDENTITY_BYTES, most_roll_bytes: int = MOST_ROLL_BYTES
    ) -> None:
        self._engine = engine
        self._campaigns: Kept[int, Campaign] = Kept(MOST_CAMPAIGN_BYTES, _weigh_campaign)
        self._campaigns_by_name: Kept[tuple[int, str], Campaign] = Kept(MOST_CAMPAIGN_BYTES, _weigh_campaign)
        self._most_bytes_each = most_identity_bytes // 2
        self._contacts: Kept[int, _Contacts] = Kept(most_identity_bytes, lambda contacts: contacts.known.nbytes)
        self._rolls: Kept[int, Roll] = Kept(most_roll_bytes, lambda roll: roll.nbytes)
        self._reads: dict[int, asyncio.Task[Roll]] = {}
        """Of rolls, under way."""
        self._kinds: dict[Kind, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of external_ids and of rolls that are kept."""
        return self._contacts.weight + self._rolls.weight

    def remember(self, campaign: Campaign) -> None:
        """Keep a campaign that was launched, without what may be large and places no event."""
        campaign = replace(campaign, content=None, audience=None)
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

    async def find_numbers(self, app_id: int, external_ids: ExternalIds) -> Numbers:
        """The contact number of each external_id; -1 where there is none."""
        if (contacts := self._contacts.get(app_id)) is None:
            contacts = _Contacts(self._most_bytes_each)
            self._contacts.put(app_id, contacts)
        if time.monotonic() >= contacts.next_look:
            await self._forget_erased(app_id, contacts)
        numbers = contacts.known.find(external_ids)
        unknown = np.flatnonzero(numbers < 0).tolist()
        if unknown:
            contacts.misses += len(unknown)
            if not contacts.is_settled:
                await self._load_identities(app_id, contacts)
                numbers = contacts.known.find(external_ids)
                unknown = np.flatnonzero(numbers < 0).tolist()
        if unknown:
            wanted = {external_ids[index] for index in unknown}
            texts = [text for text in (external_id.decode(errors="replace") for external_id in wanted) if "\0" not in text]
            async with transaction(self._engine) as conn:
                read = {text.encode(): number for text, number in (await find_numbers(conn, app_id, texts)).items()}
            contacts.learn(ExternalIds.join(list(read)), np.array(list(read.values()), np.int64))
            self._contacts.put(app_id, contacts)
            numbers[unknown] = [read.get(external_ids[index], -1) for index in unknown]
        return numbers

    async def _forget_erased(self, app_id: int, contacts: _Contacts) -> None:
        now = time.monotonic()
        contacts.next_look = now + FORGET_SECONDS
        try:
            async with transaction(self._engine) as conn:
                erased = await list_erased(conn, app_id, timedelta(seconds=now - contacts.seen_time) + LONGEST_ERASING)
        except DatabaseUnavailable:
            return  # nobody is erased meanwhile either
        contacts.seen_time = now
        contacts.forget(np.array(erased, np.int64))

    async def _load_identities(self, app_id: int, contacts: _Contacts) -> None:
        """Read all external_ids of an app whose people keep being asked for, where they fit: 0.5 µs each, by one 5 µs.

        Sooner where there is room than where other apps are dropped for it: those that take turns would be read over and over.
        """
        async with contacts.loading:
            if contacts.is_settled:
                return
            async with transaction(self._engine) as conn:
                count = await count_contacts(conn, app_id)
            size = measure_table(count)
            if size > contacts.most_bytes:
                contacts.is_settled = True
                return
            if contacts.misses < count // (20 if self._contacts.fits(size) else 4):
                return
            # Anew: what is known already would come twice, and the table grow for it.
            contacts.known, contacts.misses = Identities(), 0
            contacts.known.reserve(count)
            self._contacts.put(app_id, contacts)
            after = ""
            while not contacts.is_settled and self._contacts.get(app_id) is contacts:
                async with transaction(self._engine) as conn:
                    data, sizes, numbers = await page_numbers(conn, app_id, after, IDENTITIES_PAGE)
                external_ids = ExternalIds.cut(data, sizes)
                contacts.learn(external_ids, numbers)
                self._contacts.put(app_id, contacts)
                if len(numbers) < IDENTITIES_PAGE:
                    contacts.is_settled = True
                else:
                    after = external_ids[-1].decode()

    async def read_roll(self, campaign_id: int) -> Roll:
        """Who is at which position of a launched campaign."""
        if (roll := self._rolls.get(campaign_id)) is None:
            # Once for all who ask: a hundred streams that begin together take no more memory than one.
            if campaign_id not in self._reads:
                self._reads[campaign_id] = asyncio.create_task(self._read_roll(campaign_id), name="read a roll")
            roll = await asyncio.shield(self._reads[campaign_id])
        return roll

    async def _read_roll(self, campaign_id: int) -> Roll:
        try:
            async with transaction(self._engine) as conn:
                roll = Roll(await read_roll(conn, campaign_id))
            self._rolls.put(campaign_id, roll)
            return roll
        finally:
            del self._reads[campaign_id]

    async def number_kinds(self, wanted: Iterable[Kind]) -> Mapping[Kind, int]:
        """The number of each of these kinds, made where it is new; of one that is too many, that of the rest of its class."""
        wanted = set(wanted)
        missing = {kind.rest if len(self._kinds) >= MOST_KINDS else kind for kind in wanted - self._kinds.keys()}
        if not self._kinds.keys() >= missing:
            async with transaction(self._engine) as conn:
                numbers = await intern_kinds(conn, missing)
            # Not before the commit: receipts with a number that was rolled back could never be read again.
            self._kinds |= numbers
        return {kind: self._kinds[kind if kind in self._kinds else kind.rest] for kind in wanted}


def _weigh_campaign(campaign: Campaign) -> int:
    return CAMPAIGN_BYTES + sum(map(len, campaign.links))
