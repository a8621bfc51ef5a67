"""What belongs to a draft and is not in it yet, so that leaving its page loses nothing: content that its channel does not take
yet, and when it is to be launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import literal, null, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.store.tables import campaigns, unfinished_drafts


@dataclass(frozen=True)
class Unfinished:
    """What is kept beside a draft."""

    content: Mapping[str, Any] | None
    """None when what is stored with the draft is all there is."""
    plan: Mapping[str, Any] | None
    """None when nobody chose when."""


async def keep_unfinished(
    conn: AsyncConnection, app_id: int, campaign: str, content: Mapping[str, Any] | None, plan: Mapping[str, Any] | None
) -> None:
    """Keep this beside a draft instead of what was kept before; a plan that is None stays as it was."""
    kinds = unfinished_drafts.c
    draft = select(
        campaigns.c.campaign_id,
        null() if content is None else literal(content, kinds.content.type),
        null() if plan is None else literal(plan, kinds.plan.type),
    ).where(campaigns.c.app_id == app_id, campaigns.c.campaign == campaign, campaigns.c.state == "DRAFT")
    statement = insert(unfinished_drafts).from_select(["campaign_id", "content", "plan"], draft)
    changes = {"content": statement.excluded.content} | ({} if plan is None else {"plan": statement.excluded.plan})
    await conn.execute(statement.on_conflict_do_update(index_elements=["campaign_id"], set_=changes))


async def find_unfinished(conn: AsyncConnection, app_id: int, campaign: str) -> Unfinished:
    """What is kept beside a draft."""
    statement = (
        select(unfinished_drafts.c.content, unfinished_drafts.c.plan)
        .join(campaigns, campaigns.c.campaign_id == unfinished_drafts.c.campaign_id)
        .where(campaigns.c.app_id == app_id, campaigns.c.campaign == campaign, campaigns.c.state == "DRAFT")
    )
    row = (await conn.execute(statement)).one_or_none()
    return Unfinished(row.content, row.plan) if row else Unfinished(None, None)
