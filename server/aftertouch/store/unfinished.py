"""What somebody has typed for a draft and its channel does not take yet, so that leaving the page loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.store.tables import campaigns, unfinished_contents


async def keep_unfinished(conn: AsyncConnection, app_id: int, campaign: str, content: Mapping[str, Any]) -> None:
    """Keep a draft's unfinished content instead of what was kept before."""
    given = literal(content, unfinished_contents.c.content.type)
    draft = select(campaigns.c.campaign_id, given).where(
        campaigns.c.app_id == app_id, campaigns.c.campaign == campaign, campaigns.c.state == "DRAFT"
    )
    statement = insert(unfinished_contents).from_select(["campaign_id", "content"], draft)
    await conn.execute(
        statement.on_conflict_do_update(index_elements=["campaign_id"], set_={"content": statement.excluded.content})
    )


async def find_unfinished(conn: AsyncConnection, app_id: int, campaign: str) -> dict[str, Any] | None:
    """The unfinished content of a draft; None when what is stored with it is all there is."""
    statement = (
        select(unfinished_contents.c.content)
        .join(campaigns, campaigns.c.campaign_id == unfinished_contents.c.campaign_id)
        .where(campaigns.c.app_id == app_id, campaigns.c.campaign == campaign, campaigns.c.state == "DRAFT")
    )
    return (await conn.execute(statement)).scalar_one_or_none()


async def forget_unfinished(conn: AsyncConnection, app_id: int, campaign: str) -> None:
    """The draft's content is stored with it now."""
    found = select(campaigns.c.campaign_id).where(campaigns.c.app_id == app_id, campaigns.c.campaign == campaign)
    await conn.execute(delete(unfinished_contents).where(unfinished_contents.c.campaign_id.in_(found)))
