"""Asking again just before sending: who of a wave's people still matches the selection that they were chosen by.

Somebody who read the first message while the second was on its way should not get it. Where the people of a work unit stand on
the sources' rolls is found once; then each batch costs the receipts of the few chunks in which its people are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import ChannelType
from aftertouch.errors import NotFound
from aftertouch.retargeting.matching import Known, answer_selection
from aftertouch.retargeting.selections import Selection, Source, list_questions
from aftertouch.rolls.chunks import CHUNK, CHUNK_BITS, Bits, Numbers, byte_length, find_members, slot_range
from aftertouch.rolls.sql import find_positions, read_slots
from aftertouch.store.campaigns import find_campaigns
from aftertouch.store.kinds import Kind, load_kinds


class Recheck:
    """A selection, and where some people stand on the rolls of its sources."""

    def __init__(
        self, selection: Selection, sources: Mapping[str, Source], numbers: Numbers, positions: Mapping[str, Numbers]
    ) -> None:
        self._selection = selection
        self._sources = sources
        self._numbers = numbers
        self._positions = positions
        self._numbered: dict[int, Kind] = {}

    @classmethod
    async def prepare(
        cls,
        conn: AsyncConnection,
        app_id: int,
        channels: Mapping[str, ChannelType],
        selection: Selection,
        numbers: Numbers,
    ) -> Recheck:
        """Find the people of a unit, as contact numbers in ascending order, on the rolls of the selection's sources.

        Raises:
            NotFound: a source's channel is no longer installed, so nobody knows what its signals mean.
        """
        names = {question.source for question, _ in list_questions(selection)}
        sources: dict[str, Source] = {}
        for name, campaign in (await find_campaigns(conn, app_id, sorted(names))).items():
            if campaign.channel not in channels:
                raise NotFound(f"channels/{campaign.channel}")
            sources[name] = Source(campaign, channels[campaign.channel])
        positions = {name: await find_positions(conn, source.campaign.campaign_id, numbers) for name, source in sources.items()}
        return cls(selection, sources, numbers, positions)

    async def find_matching(self, conn: AsyncConnection, numbers: Numbers) -> NDArray[np.bool_]:
        """For each of these people of the unit, whether they match now; all as of one moment."""
        places = np.searchsorted(self._numbers, numbers)
        positions = {name: found[places] for name, found in self._positions.items()}
        starts = {name: slot_range(source.campaign.campaign_id)[0] for name, source in self._sources.items()}
        wanted = {starts[name] + chunk for name, found in positions.items() for chunk in _list_chunks(found)}
        read = await read_slots(conn, sorted(wanted))
        if {kind for kinds in read.values() for kind in kinds} - self._numbered.keys():
            self._numbered = await load_kinds(conn)
        known = {}
        for name, source in self._sources.items():
            bits = self._collect(read, starts[name], positions[name])
            known[name] = Known(source.channel, self._numbered, bits, byte_length(len(numbers)))
        matching = answer_selection(self._selection, known)
        return np.unpackbits(matching)[: len(numbers)].astype(np.bool_)

    @staticmethod
    def _collect(read: Mapping[int, Mapping[int, Bits]], start: int, positions: Numbers) -> dict[int, Bits]:
        """Each kind of a source as bits over the batch; of who is not on its roll nothing is known."""
        flags: dict[int, NDArray[np.bool_]] = {}
        for chunk in _list_chunks(positions):
            inside = np.flatnonzero(positions >> CHUNK_BITS == chunk)
            for kind, bits in read.get(start + chunk, {}).items():
                of_kind = flags.setdefault(kind, np.zeros(len(positions), np.bool_))
                of_kind[inside] = find_members(bits, positions[inside] & (CHUNK - 1))
        return {kind: np.packbits(of_kind) for kind, of_kind in flags.items()}


def _list_chunks(positions: Numbers) -> list[int]:
    chunks: list[int] = np.unique(positions[positions >= 0] >> CHUNK_BITS).tolist()
    return chunks
