"""The spool's file: what was added is there again, however it was closed, within its bounds."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aftertouch.channels import Receipt, Reply, Standing, Webhook
from aftertouch.ingest.spool import FILE, KeptAddress, Spool, SpoolFull, SpoolUnusable

ARRIVAL = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
CLICKED = Receipt(signal="clicked", token="A" * 24)
FAILED = Receipt(signal="failed", message_id="wamid.\u0000\ud83d", code="131026", time=datetime(2026, 2, 28, tzinfo=UTC))


async def test_rows_come_back_in_their_order_with_everything_they_hold(tmp_path: Path) -> None:
    async with Spool(tmp_path, 10**6) as spool:
        await spool.add("push", Webhook(receipts=(CLICKED, FAILED), unrecognized=("strange \ud83d",)), ARRIVAL)
        await spool.add("sms", Webhook(unrecognized=("x",)), ARRIVAL)
    async with Spool(tmp_path, 10**6) as spool:
        first, second = await spool.read_oldest()
        assert spool.waiting == 2
    assert (first.channel, second.channel) == ("push", "sms")
    assert first.read() == Webhook(receipts=(replace(CLICKED, time=ARRIVAL), FAILED), unrecognized=("strange \ud83d",))
    assert second.read() == Webhook(unrecognized=("x",))


async def test_rows_hold_what_people_wrote_by_the_key_of_their_address(tmp_path: Path) -> None:
    address = KeptAddress(text="+16502530000")
    reply = Reply(address=address, message_id="wamid.1", time=ARRIVAL)
    standing = Standing(address=address, state="opted_out", reason="STOP")
    async with Spool(tmp_path, 10**6) as spool:
        await spool.add("sms", Webhook(replies=(reply,), standings=(standing,)), ARRIVAL)
        (row,) = await spool.read_oldest()
    assert row.read() == Webhook(replies=(reply,), standings=(replace(standing, time=ARRIVAL),))


async def test_deleted_rows_are_gone_and_make_room(tmp_path: Path) -> None:
    async with Spool(tmp_path, 1000) as spool:
        await spool.add("push", Webhook(unrecognized=("x" * 700,)), ARRIVAL)
        with pytest.raises(SpoolFull):
            await spool.add("push", Webhook(unrecognized=("x" * 700,)), ARRIVAL)
        await spool.delete(await spool.read_oldest())
        assert (spool.size, spool.waiting) == (0, 0)
        await spool.add("push", Webhook(unrecognized=("x" * 700,)), ARRIVAL)


async def test_rows_that_are_added_at_once_are_refused_alone(tmp_path: Path) -> None:
    async with Spool(tmp_path, 2000) as spool:
        adding = (spool.add("push", Webhook(unrecognized=("x" * 300,)), ARRIVAL) for _ in range(10))
        answers = await asyncio.gather(*adding, return_exceptions=True)
        assert [type(answer) for answer in answers] == [type(None)] * 4 + [SpoolFull] * 6
        assert len(await spool.read_oldest()) == 4


async def test_row_set_aside_is_tried_again_at_the_next_start(tmp_path: Path) -> None:
    async with Spool(tmp_path, 10**6) as spool:
        for channel in ("push", "sms"):
            await spool.add(channel, Webhook(receipts=(CLICKED,)), ARRIVAL)
        first, second = await spool.read_oldest()
        await spool.set_aside(first, "KeyError: 'push'")
        assert await spool.read_oldest() == [second]
        assert (spool.waiting, spool.aside) == (1, 1)
    async with Spool(tmp_path, 10**6) as spool:
        assert await spool.read_oldest() == [first, second]
        assert (spool.waiting, spool.aside) == (2, 0)


async def test_servers_on_one_directory_see_each_others_rows(tmp_path: Path) -> None:
    async with Spool(tmp_path, 1000) as spool, Spool(tmp_path, 1000) as other:
        await spool.add("push", Webhook(unrecognized=("x" * 700,)), ARRIVAL)
        with pytest.raises(SpoolFull):
            await other.add("push", Webhook(unrecognized=("x" * 700,)), ARRIVAL)
        rows = await spool.read_oldest()
        await other.delete(rows)
        await other.add("push", Webhook(unrecognized=("y" * 700,)), ARRIVAL)
        await spool.delete(rows)
        assert [row.read() for row in await spool.read_oldest()] == [Webhook(unrecognized=("y" * 700,))]


async def test_files_are_private(tmp_path: Path) -> None:
    async with Spool(tmp_path / "new", 10**6) as spool:
        await spool.add("push", Webhook(receipts=(CLICKED,)), ARRIVAL)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert modes[FILE] == 0o600
    assert set(modes.values()) == {0o600}


async def test_broken_file_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(SpoolUnusable, match="AFTERTOUCH_SPOOL_MEGABYTES=0"):
        await Spool(tmp_path, 10**6).__aenter__()
