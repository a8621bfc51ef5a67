"""Counting, previewing and making waves while events stream in: every answer is that of one moment, exactly."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from aftertouch.client import EventStream
from aftertouch.retargeting import matching
from aftertouch.rolls.chunks import CHUNK_BYTES
from aftertouch.rolls.sql import read_roll
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2, retargeting_pb2
from tests.api.test_streams import delivered, launch_quietly, make_tokens
from tests.bench.retarget import Flags, make_contacts
from tests.fix_world import World

PEOPLE = 20_000
"""Three chunks: one moment has to hold across rows."""
IN_A_BATCH = 200
ROUNDS = 5


class History:
    """What was streamed, batch by batch: whatever is asked has to be answered as of the end of one of them."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(7)
        self.batches: list[tuple[str, np.ndarray[Any, np.dtype[np.int64]]]] = []

    def add(self) -> tuple[str, list[int]]:
        """The next batch: who clicked, or was delivered to."""
        signal = "clicked" if len(self.batches) % 2 else "delivered"
        people = self._random.choice(PEOPLE, IN_A_BATCH, replace=False)
        self.batches.append((signal, people))
        return signal, people.tolist()

    def replay(self, first: int, last: int) -> Iterator[dict[str, Flags]]:
        """Who matches each action after ``first`` batches, after one more, and so on."""
        reported = {"delivered": np.zeros(PEOPLE, np.bool_), "clicked": np.zeros(PEOPLE, np.bool_)}
        for number in range(last + 1):
            if number:
                signal, people = self.batches[number - 1]
                reported[signal][people] = True
            if number >= first:
                clicked = reported["clicked"].copy()
                reached = reported["delivered"] | clicked
                yield {"delivered": reached, "clicked": clicked, "not_clicked": reached & ~clicked}


Expect = Callable[[dict[str, Flags]], Any]
"""What an answer has to be, from who matches each action."""
ACTIONS = ("delivered", "clicked", "not_clicked")


@dataclass
class Questions:
    """Each asks once, and returns what the answer is to be held to, and the answer."""

    world: World
    source: str
    active: dict[str, Flags]

    async def list_actions(self) -> tuple[Expect, Any]:
        answer = await self.world.client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=self.source))
        found = {counted.action.action: counted.count for counted in answer.actions}
        return lambda true: {name: count(flags) for name, flags in true.items()}, {name: found[name] for name in ACTIONS}

    async def get_matrix(self) -> tuple[Expect, Any]:
        answer = await self.world.client.retargeting.GetMatrix(retargeting_pb2.GetMatrixRequest(name=self.source))
        cells = {
            (row.action_count.action.action, cell.channel): cell.reachable_count for row in answer.rows for cell in row.cells
        }
        asked = list(itertools.product(ACTIONS, self.active))

        def expect(true: dict[str, Flags]) -> Any:
            return {(name, channel): count(true[name] & self.active[channel]) for name, channel in asked}

        return expect, {cell: cells[cell] for cell in asked}

    async def preview(self) -> tuple[Expect, Any]:
        request = retargeting_pb2.PreviewRetargetRequest(selection=self._select(), channel="push")
        answer = await self.world.client.retargeting.PreviewRetarget(request)
        assert answer.matched_count == answer.audience_count + sum(drop.count for drop in answer.drops)

        def expect(true: dict[str, Flags]) -> Any:
            return count(true["not_clicked"]), count(true["not_clicked"] & self.active["push"])

        return expect, (answer.matched_count, answer.audience_count)

    async def create(self) -> tuple[Expect, Any]:
        request = retargeting_pb2.CreateRetargetRequest(
            selection=self._select(), channel="push", evaluation=campaigns_pb2.Audience.AT_CREATION, allow_duplicate=True
        )
        draft = await self.world.client.retargeting.CreateRetarget(request)
        async with transaction(self.world.core.engine) as conn:
            statement = text("SELECT campaign_id FROM campaigns WHERE campaign = :name")
            campaign_id = (await conn.execute(statement, {"name": draft.name.rpartition("/")[2]})).scalar_one()
            roll = (await read_roll(conn, campaign_id)).tolist()
        assert draft.audience.frozen.count == len(roll)
        return lambda true: np.flatnonzero(true["not_clicked"] & self.active["push"]).tolist(), roll

    def _select(self) -> campaigns_pb2.RetargetSelection:
        return campaigns_pb2.RetargetSelection(source=self.source, action="not_clicked")


def count(flags: Flags) -> int:
    return int(np.count_nonzero(flags))


async def test_every_answer_is_of_one_moment_while_events_stream_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that people are counted in several stretches, as those of a large campaign are.
    monkeypatch.setattr(matching, "STRETCH_BYTES", CHUNK_BYTES)
    source = await launch_quietly(world, "busy", PEOPLE, launch_time=datetime.now(UTC))
    async with transaction(world.core.engine) as conn:
        app_id = (await conn.execute(text("SELECT app_id FROM apps WHERE app = 'acme'"))).scalar_one()
    active = {channel: flags[:PEOPLE] for channel, flags in (await make_contacts(world.core.engine, app_id, PEOPLE)).items()}
    tokens = await make_tokens(world, source, PEOPLE)
    questions, history, done = Questions(world, source, active), History(), asyncio.Event()

    async def pour(stream: EventStream) -> None:
        while not done.is_set():
            signal, people = history.add()
            await stream.send(delivered([tokens[person] for person in people], signal))

    moments = []
    async with world.client.stream_events("importer") as stream, asyncio.TaskGroup() as group:
        group.create_task(pour(stream))
        for ask in [questions.list_actions, questions.get_matrix, questions.preview, questions.create] * ROUNDS:
            before = stream.committed
            expect, found = await ask()
            after = len(history.batches)
            ends = zip(range(before, after + 1), history.replay(before, after), strict=True)
            agreeing = [number for number, true in ends if expect(true) == found]
            assert agreeing, f"{ask.__name__} answered what was true after none of the batches {before} to {after}"
            moments.append(agreeing[0])
            while stream.committed == before:  # noqa: ASYNC110 - there is nothing to wait on but what is durable
                await asyncio.sleep(0.01)
        done.set()
    assert not stream.rejections
    assert moments[-1] > moments[0], "nothing streamed in meanwhile"
