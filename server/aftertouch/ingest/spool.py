"""The spool: what providers reported while the database was away, in a file until the database has it.

A row is synced to disk before its provider is answered, and deleted only after it is durable elsewhere, so a crash at any
moment loses nothing and at most repeats something, which changes no receipt. Servers on the same data directory share the
file; each replays what it finds, and since the numbers of rows are never used again none deletes a row that it did not read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from aftertouch.channels import Address, Receipt, Reply, Standing, Webhook

FILE = "spool.sqlite"
ROW_BYTES = 100
"""What a row takes besides its text: its number, its time, and its entry in the index."""
READ_BYTES = 1 << 20
"""Text that is read at a time: some 4,000 of Twilio's receipts, or one of Meta's largest webhooks."""
BUSY_SECONDS = 5.0
"""For another server on the same file to finish its write."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spooled (
    id INTEGER PRIMARY KEY AUTOINCREMENT, channel TEXT NOT NULL, app_id INTEGER, receipts TEXT NOT NULL, inbound TEXT NOT NULL,
    unrecognized TEXT NOT NULL, arrive_time TEXT NOT NULL, size INTEGER NOT NULL, error TEXT);
CREATE INDEX IF NOT EXISTS spooled_by_error ON spooled (error, id, size);
"""
_Row = tuple[str, int | None, str, str, str, str, int]
Answer = TypeVar("Answer")


class SpoolFull(Exception):
    """There is no room; nothing was stored."""


class SpoolUnusable(Exception):
    """The file cannot be opened; the text says what to do about it."""


class KeptAddress(Address):
    """All that is kept of an address that somebody wrote from."""

    text: str

    @property
    def key(self) -> str:
        return self.text


@dataclass(frozen=True)
class Spooled:
    """What one webhook said, as it was written down."""

    number: int
    channel: str
    app_id: int | None
    """The app to whose own account it was reported; None for the server's."""
    receipts: str
    inbound: str
    unrecognized: str
    size: int

    def read(self) -> Webhook:
        """What it said; everything has a time."""
        receipts, inbound = json.loads(self.receipts), json.loads(self.inbound)
        return Webhook(
            receipts=tuple(Receipt(**_read_time(fields)) for fields in receipts),
            replies=tuple(Reply(**_read_address(fields)) for fields in inbound["replies"]),
            standings=tuple(Standing(**_read_address(fields)) for fields in inbound["standings"]),
            unrecognized=tuple(map(str, json.loads(self.unrecognized))),
        )


def _read_time(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "time": datetime.fromisoformat(fields["time"])}


def _read_address(fields: dict[str, Any]) -> dict[str, Any]:
    return {**_read_time(fields), "address": KeptAddress(text=fields["address"])}


def _write(item: Receipt | Reply | Standing, arrive_time: datetime) -> dict[str, Any]:
    fields = {each.name: getattr(item, each.name) for each in dataclasses.fields(item)}
    if not isinstance(item, Receipt):
        fields["address"] = item.address.key
    return fields | {"time": (item.time or arrive_time).isoformat()}


@dataclass
class _Addition:
    row: _Row
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Spool:
    """The open file; a context manager. One thread of its own talks to SQLite, so nothing here blocks the event loop."""

    def __init__(self, data_dir: Path, most_bytes: int) -> None:
        self._path = data_dir / FILE
        self._most_bytes = most_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        self._additions: list[_Addition] = []
        self._writing: asyncio.Task[None] | None = None
        self._version = -1
        self.size = 0
        """Bytes that its rows take."""
        self.waiting = 0
        """Rows to be replayed."""
        self.aside = 0
        """Rows that were set aside, because they could not be stored with the database in reach."""

    async def __aenter__(self) -> Self:
        try:
            await self._run(self._open)
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown()
            raise SpoolUnusable(
                f"{self._path} cannot be opened ({error}): name a directory that this user may write as AFTERTOUCH_DATA_DIR, "
                "or do without a spool with AFTERTOUCH_SPOOL_MEGABYTES=0"
            ) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writing:
            await self._writing
        await self._run(lambda: self._conn.close())
        self._thread.shutdown()

    async def add(self, channel: str, webhook: Webhook, arrive_time: datetime, app_id: int | None = None) -> None:
        """Return when it is on disk; what comes meanwhile shares the next sync. What has no time gets the arrival's.

        Raises:
            SpoolFull: it does not fit.
            sqlite3.Error: the disk is full or broken.
        """
        written = json.dumps([_write(receipt, arrive_time) for receipt in webhook.receipts])
        inbound = json.dumps(
            {name: [_write(item, arrive_time) for item in getattr(webhook, name)] for name in ("replies", "standings")}
        )
        strange = json.dumps(list(webhook.unrecognized))
        size = len(written) + len(inbound) + len(strange) + ROW_BYTES
        addition = _Addition((channel, app_id, written, inbound, strange, arrive_time.isoformat(), size))
        self._additions.append(addition)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="write the spool")
        await addition.done

    async def read_oldest(self) -> list[Spooled]:
        """The oldest rows to be replayed, as many as are read at a time."""
        return await self._run(self._select)

    async def delete(self, rows: Iterable[Spooled]) -> None:
        """Forget rows that are durable elsewhere."""
        await self._run(partial(self._delete, rows))

    async def set_aside(self, row: Spooled, error: str) -> None:
        """Keep a row out of the way of the others until the next start."""
        await self._run(partial(self._mark, row, error))

    async def _run(self, work: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _write(self) -> None:
        while group := self._additions:
            self._additions = []
            error: Exception | None = None
            fitting = 0
            try:
                fitting = await self._run(partial(self._insert, [addition.row for addition in group]))
            except Exception as caught:
                # Everybody of the group waits for an answer, and answers for this one.
                error = caught
            for place, addition in enumerate(group):
                if addition.done.done():
                    continue
                if place < fitting:
                    addition.done.set_result(None)
                else:
                    addition.done.set_exception(error or SpoolFull(f"{FILE} is full"))

    # In the thread:

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its other files the mode of this one.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._conn = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level="IMMEDIATE")
        self._conn.execute("PRAGMA journal_mode = WAL")
        # In WAL mode only FULL syncs at every commit.
        self._conn.execute("PRAGMA synchronous = FULL")
        self._conn.executescript(_SCHEMA)
        # A newer version, or a plugin that is back, may be able to store what was set aside.
        with self._conn:
            self._conn.execute("UPDATE spooled SET error = NULL WHERE error IS NOT NULL")
        self._measure()

    def _insert(self, rows: Sequence[_Row]) -> int:
        """Write the rows that fit, and return how many; those after them do not."""
        with self._conn:
            self._conn.execute("BEGIN IMMEDIATE")
            self._measure()
            size = self.size
            fitting = 0
            for row in rows:
                size += row[-1]
                if size > self._most_bytes:
                    break
                fitting += 1
            self._conn.executemany(
                "INSERT INTO spooled (channel, app_id, receipts, inbound, unrecognized, arrive_time, size)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows[:fitting],
            )
        self.size += sum(row[-1] for row in rows[:fitting])
        self.waiting += fitting
        return fitting

    def _select(self) -> list[Spooled]:
        self._measure()
        found: list[Spooled] = []
        size = 0
        cursor = self._conn.execute(
            "SELECT id, channel, app_id, receipts, inbound, unrecognized, size FROM spooled WHERE error IS NULL ORDER BY id"
        )
        for columns in cursor:
            found.append(Spooled(*columns))
            size += found[-1].size
            if size >= READ_BYTES:
                break
        cursor.close()
        return found

    def _delete(self, rows: Iterable[Spooled]) -> None:
        with self._conn:
            # Another server may have replayed one too, and deleted it.
            gone = [row for row in rows if self._conn.execute("DELETE FROM spooled WHERE id = ?", (row.number,)).rowcount]
        self.size -= sum(row.size for row in gone)
        self.waiting -= len(gone)

    def _mark(self, row: Spooled, error: str) -> None:
        with self._conn:
            changed = self._conn.execute(
                "UPDATE spooled SET error = ? WHERE id = ? AND error IS NULL", (error, row.number)
            ).rowcount
        self.waiting -= changed
        self.aside += changed

    def _measure(self) -> None:
        """Count again if another server was there: 40 ms for 100,000 rows."""
        (version,) = self._conn.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._version = version
            self.size, self.waiting, self.aside = self._conn.execute(
                "SELECT coalesce(sum(size), 0), count(*) FILTER (WHERE error IS NULL), count(error) FROM spooled"
            ).fetchone()
