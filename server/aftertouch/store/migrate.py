"""Bring a database's schema up to date. Alembic takes most of a second to import, so only the commands that migrate do."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

from aftertouch.store.engine import open_engine


async def migrate(database_url: str) -> None:
    """Apply every migration that is missing, in one transaction; waits for another migration that is running."""
    async with open_engine(database_url) as engine, engine.begin() as conn:
        await conn.run_sync(_upgrade)


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
