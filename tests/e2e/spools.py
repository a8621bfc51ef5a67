"""The spool of a server, seen from outside of it."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

from aftertouch.ingest.spool import FILE


def count_rows(data_dir: Path, where: str = "error IS NULL") -> int:
    """Rows of the spool; none where there is no spool."""
    if not (data_dir / FILE).exists():
        return 0
    with closing(sqlite3.connect(data_dir / FILE)) as conn:
        return int(conn.execute(f"SELECT count(*) FROM spooled WHERE {where}").fetchone()[0])


async def wait_until_drained(data_dir: Path) -> None:
    """Wait until nothing is left to be replayed."""
    async with asyncio.timeout(120):
        while count_rows(data_dir):  # noqa: ASYNC110 - there is nothing to wait on but the file
            await asyncio.sleep(0.02)
