"""`make bench-retarget`: what questions of a campaign to ten million people cost, through gRPC, against a row for each delivery.

Client, server and database are processes of this machine. The campaign's roll is scattered over its app's contacts, everybody
was delivered to, read or failed by chance, and two thirds are subscribed elsewhere. The row model is plain SQL over a table in
the same database, asked for the same numbers in the same run: one narrow row for each delivery with a time for each signal,
freshly vacuumed, and no other campaign in the way. It is asked twice: by a SELECT for each action, as a list's page or a resend
does it, and for all actions in one scan, which is the best that can be written. Every count is compared, between them and with
numpy's.

Then the same is asked again while a million events a minute stream into the campaign, reads of people all over its roll; and
every answer has to be that after one of the batches that were under way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.client import Client, EventStream
from aftertouch.ingest.tokens import TokenCodec
from aftertouch.rolls.chunks import CHUNK, CHUNK_BYTES, SLOT_SHIFT, BitRows, Numbers, byte_length, count_chunks, slot_range
from aftertouch.rolls.sql import SetChange, change_sets, upsert_receipts, write_roll
from aftertouch.store.campaigns import create_campaign, update_campaign
from aftertouch.store.contacts import STANDINGS, standing_set
from aftertouch.store.engine import driver, transaction
from aftertouch.store.kinds import Kind, intern_kinds, load_kinds
from aftertouch.store.tables import contact_counters
from aftertouch.v1 import campaigns_pb2, events_pb2, retargeting_pb2
from tests.bench.ingest import open_bench

LARGE = 10_000_000
SPREAD = 1.25
"""Contacts of the app for each person of the large campaign."""
ROUNDS = 7
IN_A_BATCH = 1_000
A_MINUTE = 1_000_000
"""Events that stream in meanwhile."""

Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass
class Made:
    """A campaign, and what became of its people by position."""

    campaign_id: int
    name: str
    roll: Numbers
    signals: dict[str, Flags]


async def make_contacts(engine: AsyncEngine, app_id: int, contacts: int) -> dict[str, Flags]:
    """Contact sets of so many people, without their rows, which no question reads; returned is who is active where."""
    random = np.random.default_rng(5)
    blocks = count_chunks(contacts)
    active = {}
    async with transaction(engine) as conn:
        await conn.execute(insert(contact_counters).values(app_id=app_id, next_number=contacts))
        for channel in ("push", "sms", "whatsapp"):
            fate = random.random(blocks * CHUNK)
            fate[contacts:] = 1
            active[channel] = fate < 0.67
            members = (fate < 0.67, (fate >= 0.67) & (fate < 0.7), (fate >= 0.7) & (fate < 0.72))
            for standing, flags in zip(STANDINGS, members, strict=True):
                packed = np.packbits(flags).reshape(-1, CHUNK_BYTES)
                touched = np.full(CHUNK_BYTES, 255, np.uint8)
                name = standing_set(standing, channel)
                first = app_id << SLOT_SHIFT
                await change_sets(conn, [SetChange(first | block, name, touched, bits) for block, bits in enumerate(packed)])
    return active


async def make_campaign(engine: AsyncEngine, app_id: int, name: str, people: int, contacts: int) -> Made:
    """A WhatsApp campaign that was sent to so many of the contacts, and its receipts."""
    random = np.random.default_rng(people)
    roll = np.sort(random.choice(contacts, people, replace=False)).astype(np.int64)
    fate = random.random(people)
    signals = {
        "delivered": fate < 0.8,
        "read": fate < 0.5,
        "clicked": fate < 0.1,
        "replied": (fate >= 0.08) & (fate < 0.12),
        "failed/transient": (fate >= 0.8) & (fate < 0.9),
        "failed/recipient_gone": (fate >= 0.9) & (fate < 0.95),
        "sent": fate < 0.9,
        "attempted": np.ones(people, np.bool_),
    }
    async with transaction(engine) as conn:
        campaign = await create_campaign(conn, app_id, name, {"display_name": name, "channel": "whatsapp"})
        await write_roll(conn, campaign.campaign_id, roll)
        now = datetime.now(UTC)
        await update_campaign(conn, campaign.campaign_id, state="SENT", recipients=people, launch_time=now, finish_time=now)
        kinds = {
            signal: Kind(
                signal.partition("/")[0], signal.partition("/")[2], "1" if "/" in signal or signal == "attempted" else ""
            )
            for signal in signals
        }
        numbers = await intern_kinds(conn, kinds.values())
        for signal, flags in signals.items():
            packed = np.packbits(flags).tobytes()
            ends = [min((chunk + 1) * CHUNK_BYTES, byte_length(people)) for chunk in range(count_chunks(people))]
            slots = [slot_range(campaign.campaign_id)[0] + chunk for chunk in range(len(ends))]
            bits = [packed[chunk * CHUNK_BYTES : end] for chunk, end in enumerate(ends)]
            await upsert_receipts(conn, BitRows(slots, [numbers[kinds[signal]]] * len(slots), bits))
    return Made(campaign.campaign_id, f"apps/bench/campaigns/{name}", roll, signals)


async def make_rows(engine: AsyncEngine, made: Made) -> None:
    """The same campaign in a table with a row for each delivery."""
    failed = made.signals["failed/transient"] | made.signals["failed/recipient_gone"]
    names = ("sent", "delivered", "read", "clicked", "replied")
    times = {name: made.signals[name] for name in names} | {"failed": failed}
    async with transaction(engine) as conn:
        columns = "".join(f", {name} timestamptz" for name in times)
        await conn.execute(text(f"CREATE TABLE deliveries (campaign_id bigint, contact bigint{columns})"))
        # 36 bytes of values by COPY as text would take minutes, so what happened goes in as bits and comes out as times.
        happened = sum((flags.astype(np.int64) << place for place, flags in enumerate(times.values())), np.zeros(1, np.int64))
        await conn.execute(text("CREATE TEMPORARY TABLE happened (contact bigint, bits bigint) ON COMMIT DROP"))
        await copy_columns(conn, "happened", [made.roll, happened])
        values = "".join(f", CASE WHEN bits & {1 << place} > 0 THEN now() END" for place in range(len(times)))
        await conn.execute(text(f"INSERT INTO deliveries SELECT {made.campaign_id}, contact{values} FROM happened"))
        await conn.execute(text("ALTER TABLE deliveries ADD PRIMARY KEY (campaign_id, contact)"))
    async with engine.connect() as conn:
        await (await conn.execution_options(isolation_level="AUTOCOMMIT")).execute(text("VACUUM ANALYZE deliveries"))


async def copy_columns(conn: AsyncConnection, table: str, columns: list[Numbers]) -> None:
    """COPY arrays as the columns of a table, in PostgreSQL's binary format."""
    fields = [("count", ">i2")] + [f for i in range(len(columns)) for f in ((f"length{i}", ">i4"), (f"value{i}", ">i8"))]
    rows = np.zeros(len(columns[0]), np.dtype(fields))
    rows["count"] = len(columns)
    for index, column in enumerate(columns):
        rows[f"length{index}"], rows[f"value{index}"] = 8, column
    cursor = (await driver(conn)).cursor()
    async with cursor.copy(f"COPY {table} FROM STDIN (FORMAT BINARY)") as copy:
        await copy.write(b"PGCOPY\n\xff\r\n\x00" + bytes(8))
        for start in range(0, len(rows), 1_000_000):
            await copy.write(rows[start : start + 1_000_000].tobytes())
        await copy.write(b"\xff\xff")


ROW_ACTIONS = {
    "not_read": "delivered IS NOT NULL AND read IS NULL",
    "not_received": "(failed IS NOT NULL OR sent IS NOT NULL) AND delivered IS NULL",
    "read": "read IS NOT NULL",
    "failed": "failed IS NOT NULL AND delivered IS NULL",
    "replied": "replied IS NOT NULL",
    "not_replied": "delivered IS NOT NULL AND replied IS NULL",
    "clicked": "clicked IS NOT NULL",
    "not_clicked": "delivered IS NOT NULL AND clicked IS NULL",
    "unclear": "sent IS NULL AND failed IS NULL",
}
"""WhatsApp's actions as a table of rows is asked for them."""


async def clock(works: Sequence[Callable[[], Awaitable[Any]]], rounds: int = ROUNDS) -> list[tuple[float, Any]]:
    """The median of milliseconds and the last answer of each, taken in turns so that other work on the machine meets all alike.

    The first round fills what is kept, and is not counted.
    """
    answers = [await work() for work in works]
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for place, work in enumerate(works):
            began = time.perf_counter()
            answers[place] = await work()
            taken[place].append((time.perf_counter() - began) * 1e3)
    return [(median(times), answer) for times, answer in zip(taken, answers, strict=True)]


class Questions:
    """What is asked, through gRPC."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def list_actions(self, made: Made) -> dict[str, int]:
        answer = await self.client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=made.name))
        return {counted.action.action: counted.count for counted in answer.actions}

    async def get_matrix(self, made: Made) -> dict[tuple[str, str], int]:
        answer = await self.client.retargeting.GetMatrix(retargeting_pb2.GetMatrixRequest(name=made.name))
        return {(row.action_count.action.action, cell.channel): cell.reachable_count for row in answer.rows for cell in row.cells}

    async def preview(self, made: Made) -> Any:
        request = retargeting_pb2.PreviewRetargetRequest(selection=select_unread(made), channel="sms")
        return await self.client.retargeting.PreviewRetarget(request)

    async def create(self, made: Made) -> Any:
        """Freeze half the people as the audience of a wave on another channel."""
        request = retargeting_pb2.CreateRetargetRequest(
            selection=select_half(made), channel="sms", evaluation=campaigns_pb2.Audience.AT_CREATION, allow_duplicate=True
        )
        return await self.client.retargeting.CreateRetarget(request)

    async def delete(self, draft: Any) -> None:
        await self.client.campaigns.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=draft.name))


def select_unread(made: Made) -> campaigns_pb2.RetargetSelection:
    return campaigns_pb2.RetargetSelection(source=made.name, action="not_read")


def select_half(made: Made) -> campaigns_pb2.RetargetSelection:
    """Four fifths of the people, of whom two thirds can be reached by SMS: half."""
    parts = [campaigns_pb2.RetargetSelection(source=made.name, action=action) for action in ("read", "not_read")]
    return campaigns_pb2.RetargetSelection(any_of=campaigns_pb2.RetargetSelections(selections=parts))


async def count_rows(engine: AsyncEngine, made: Made) -> dict[str, int]:
    """Every action of the table of rows, by a statement of its own."""
    of_campaign = f"SELECT count(*) FROM deliveries WHERE campaign_id = {made.campaign_id}"
    async with engine.connect() as conn:
        return {
            name: (await conn.execute(text(f"{of_campaign} AND ({condition})"))).scalar_one()
            for name, condition in ROW_ACTIONS.items()
        }


async def count_rows_at_once(engine: AsyncEngine, made: Made) -> dict[str, int]:
    """Every action in one scan of the table of rows."""
    counted = ", ".join(f"count(*) FILTER (WHERE {condition})" for condition in ROW_ACTIONS.values())
    async with engine.connect() as conn:
        row = (await conn.execute(text(f"SELECT {counted} FROM deliveries WHERE campaign_id = {made.campaign_id}"))).one()
    return dict(zip(ROW_ACTIONS, row, strict=True))


async def count_one_set(engine: AsyncEngine, made: Made, kind: int) -> int:
    """How many have one signal: the least that PostgreSQL has to do for a question."""
    first, last = slot_range(made.campaign_id)
    statement = "SELECT sum(bit_count(bits)) FROM receipts WHERE slot >= :first AND slot < :last AND kind = :kind"
    async with engine.connect() as conn:
        return int((await conn.execute(text(statement), {"first": first, "last": last, "kind": kind})).scalar_one())


def expect_actions(made: Made) -> dict[str, Flags]:
    """Who matches each action, by position."""
    failed = made.signals["failed/transient"] | made.signals["failed/recipient_gone"]
    delivered, read = made.signals["delivered"], made.signals["read"]
    return {
        "not_read": delivered & ~read,
        "not_received": (failed | made.signals["sent"]) & ~delivered,
        "read": read,
        "failed": failed & ~delivered,
        "replied": made.signals["replied"],
        "not_replied": delivered & ~made.signals["replied"],
        "clicked": made.signals["clicked"],
        "not_clicked": delivered & ~made.signals["clicked"],
        "unclear": ~made.signals["sent"] & ~failed,
    }


async def measure_create(questions: Questions, made: Made, active: Flags) -> float:
    """Milliseconds for the draft of a wave with its people frozen, the median of several, each deleted again."""
    taken = []
    expected = int(np.count_nonzero(made.signals["delivered"] & active[made.roll]))
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        draft = await questions.create(made)
        taken.append((time.perf_counter() - began) * 1e3)
        assert draft.audience.frozen.count == expected, (draft.audience.frozen.count, expected)
        await questions.delete(draft)
    return median(taken[1:])


class Readers:
    """People who read one after the other, batch by batch, those of whom nobody knew it before."""

    def __init__(self, made: Made, active: dict[str, Flags]) -> None:
        unread = np.flatnonzero(made.signals["delivered"] & ~made.signals["read"])
        self.positions = np.random.default_rng(9).permutation(unread)
        self.sent = 0
        """Batches."""
        self._campaign_id = made.campaign_id
        self._reached = {channel: np.cumsum(flags[made.roll[self.positions]]) for channel, flags in active.items()}

    async def pour(self, stream: EventStream, codec: TokenCodec, done: asyncio.Event) -> float:
        """Stream a million events a minute until it is enough; returned is how many it were in fact."""
        began = time.perf_counter()
        while not done.is_set():
            await asyncio.sleep(began + self.sent * IN_A_BATCH * 60 / A_MINUTE - time.perf_counter())
            first = self.sent * IN_A_BATCH
            assert first + IN_A_BATCH <= len(self.positions), "everybody has read: ask more --people"
            tokens = codec.make(self._campaign_id, self.positions[first : first + IN_A_BATCH])
            self.sent += 1
            await stream.send([events_pb2.Event(token=token, signal="read") for token in tokens])
        await stream.flush()
        return self.sent * IN_A_BATCH / (time.perf_counter() - began) * 60

    def count_reached(self, channel: str, readers: int) -> int:
        """How many of the first readers can be reached on a channel."""
        return int(self._reached[channel][readers - 1]) if readers else 0


async def measure_busy(
    questions: Questions, codec: TokenCodec, made: Made, active: dict[str, Flags], quiet: dict[str, float]
) -> dict[str, float]:
    """The same questions while events stream in, each answer held to what was true after one of the batches under way."""
    readers, done = Readers(made, active), asyncio.Event()
    counts = {action: int(np.count_nonzero(flags)) for action, flags in expect_actions(made).items()}
    unread = {
        channel: int(np.count_nonzero(expect_actions(made)["not_read"] & flags[made.roll])) for channel, flags in active.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in quiet}

    async with questions.client.stream_events("readers") as stream, asyncio.TaskGroup() as group:
        pouring = group.create_task(readers.pour(stream, codec, done))

        async def ask(name: str, work: Callable[[Made], Awaitable[Any]]) -> tuple[Any, int, int]:
            before, began = stream.committed, time.perf_counter()
            answer = await work(made)
            taken[name].append((time.perf_counter() - began) * 1e3)
            return answer, before * IN_A_BATCH, readers.sent * IN_A_BATCH

        for _ in range(ROUNDS):
            found, before, after = await ask("actions", questions.list_actions)
            new = found["read"] - counts["read"]
            assert before <= new <= after, (before, new, after)
            assert not new % IN_A_BATCH, new
            assert found == counts | {"read": counts["read"] + new, "not_read": counts["not_read"] - new}
            cells, before, after = await ask("matrix", questions.get_matrix)
            matching = [
                readers_so_far
                for readers_so_far in range(before, after + 1, IN_A_BATCH)
                if all(
                    cells["not_read", channel] == unread[channel] - readers.count_reached(channel, readers_so_far)
                    for channel in active
                )
            ]
            assert matching, (before, after)
            shown, before, after = await ask("funnel", questions.preview)
            new = counts["not_read"] - shown.matched_count
            assert before <= new <= after, (before, new, after)
            assert shown.audience_count == unread["sms"] - readers.count_reached("sms", new)
            draft, _, _ = await ask("create", questions.create)
            reached = made.signals["delivered"] & active["sms"][made.roll]
            assert draft.audience.frozen.count == np.count_nonzero(reached)
            await questions.delete(draft)
        done.set()
        rate = await pouring
    return {"events_a_minute": round(rate)} | {name: round(median(times) / quiet[name], 2) for name, times in taken.items()}


async def measure(people: int) -> dict[str, Any]:
    """Ask everything, and compare every answer."""
    contacts = int(people * SPREAD)
    async with open_bench() as bench:
        engine = bench.engine
        active = await make_contacts(engine, bench.app_id, contacts)
        large = await make_campaign(engine, bench.app_id, "large", people, contacts)
        small = await make_campaign(engine, bench.app_id, "small", people // 10, contacts)
        await make_rows(engine, large)
        async with engine.connect() as conn:
            await (await conn.execution_options(isolation_level="AUTOCOMMIT")).execute(text("VACUUM ANALYZE"))
            delivered = next(number for number, kind in (await load_kinds(conn)).items() if kind.signal == "delivered")
        expected = expect_actions(large)
        counts = {action: int(np.count_nonzero(flags)) for action, flags in expected.items()}
        async with Client(bench.address, api_key=bench.key, app="bench") as client:
            questions = Questions(client)
            began = time.perf_counter()
            await questions.get_matrix(large)
            first_ms = (time.perf_counter() - began) * 1e3
            (
                (one_set, one_found),
                (actions, actions_found),
                (matrix, cells),
                (funnel, shown),
                (one_scan, scanned),
            ) = await clock(
                [
                    partial(count_one_set, engine, large, delivered),
                    partial(questions.list_actions, large),
                    partial(questions.get_matrix, large),
                    partial(questions.preview, large),
                    partial(count_rows_at_once, engine, large),
                ]
            )
            # By itself: nine scans in each round would leave nothing of the others in any cache.
            ((rows, rows_found),) = await clock([partial(count_rows, engine, large)], rounds=3)
            assert one_found == np.count_nonzero(large.signals["delivered"])
            assert actions_found == rows_found == scanned == counts, (actions_found, rows_found, scanned, counts)
            for (action, channel), count in cells.items():
                if channel in active:
                    assert count == np.count_nonzero(expected[action] & active[channel][large.roll]), (action, channel)
            assert shown.matched_count == counts["not_read"] == shown.audience_count + sum(drop.count for drop in shown.drops)
            assert shown.audience_count == cells["not_read", "sms"]
            create = await measure_create(questions, large, active["sms"])
            create_small = await measure_create(questions, small, active["sms"])
            quiet = {"actions": actions, "matrix": matrix, "funnel": funnel, "create": create}
            busy = await measure_busy(questions, bench.codec, large, active, quiet)
    return {
        "bench": "retarget",
        "one_set_select_ms": round(one_set, 2),
        "actions_10m_ms": round(actions, 1),
        "matrix_10m_ms": round(matrix, 1),
        "funnel_10m_ms": round(funnel, 1),
        "create_5m_of_10m_ms": round(create),
        "create_per_contact_growth": round(create / people / (create_small / (people // 10)), 2),
        "row_model_ms": round(rows),
        "row_model_one_scan_ms": round(one_scan),
        "first_question_ms": round(first_ms),
        "busy_to_quiet": busy,
        "ratios": {
            "actions_to_one_set": round(actions / one_set, 1),
            "row_model_to_actions": round(rows / actions),
            "row_model_one_scan_to_actions": round(one_scan / actions),
        },
    }


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.retarget", description=__doc__)
    parser.add_argument("--people", type=int, default=LARGE, help="of the large campaign; the small one has a tenth")
    print(json.dumps(await measure(parser.parse_args().people)))


if __name__ == "__main__":
    asyncio.run(main())
