"""Inbound: what people write to us, as news of the message that they answer, and as their own word on being written to.

A provider knows an address and a sender, not our apps. So a reply goes to the last message to the address, whichever app sent it,
and a stop holds for everybody who has the address: of the one app whose own account was spoken to, or else of all that share the
server's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import ReasonClass, Reply, Standing
from aftertouch.rolls.chunks import CHUNK, chunk_of
from aftertouch.store.app_secrets import list_owners
from aftertouch.store.campaigns import Campaign, list_sent_since
from aftertouch.store.contacts import Subscriber, find_subscribers, hash_address, set_states
from aftertouch.store.kinds import load_kinds
from aftertouch.store.recipients import Place, find_places, read_last_tried, read_true_kinds

REPLY_WINDOW = timedelta(days=7)
"""Whoever writes later than that after the last message does not answer it."""
MOST_CAMPAIGNS = 50
"""Of an app, that are looked through for the message that a reply answers; the newest."""
_UNREACHED = frozenset({"attempted", "refused", "sent", "failed"})
"""All that is known of somebody whose message failed and who therefore answers another one."""
_TOLERANCE = timedelta(seconds=1)
"""Meta writes whole seconds."""


async def find_answered(
    conn: AsyncConnection, channel: str, reply: Reply, app_id: int | None = None
) -> tuple[Campaign, int] | None:
    """The campaign and the position of the last message to where a reply came from; None when there is none.

    Who was sent to is read from the receipts, which know it before the provider does: the log of attempts may be written after
    a quick answer. A reply that names a message which is not in the log can only be to one that is not there yet.
    """
    address_hash, now = hash_address(reply.address.key), datetime.now(UTC)
    campaigns: dict[int, Campaign] = {}
    places: list[Place] = []
    for subscriber in await _find_subscribers(conn, channel, address_hash, app_id):
        own = await list_sent_since(conn, subscriber.app_id, channel, (reply.time or now) - REPLY_WINDOW, MOST_CAMPAIGNS)
        campaigns |= {campaign.campaign_id: campaign for campaign in own}
        places += await find_places(conn, subscriber.number, [campaign.campaign_id for campaign in own])
    true, tried = await read_true_kinds(conn, places), await read_last_tried(conn, places)
    # Read afterwards: a kind that is new since has its number by now.
    numbered = await load_kinds(conn)
    sent: dict[Place, datetime] = {}
    for place in places:
        signals = {numbered[kind].signal for kind in true[place]}
        if "attempted" not in signals:
            continue
        campaign = campaigns[place.campaign_id]
        if place not in tried:
            # Just now; or before a crash, and then it was launched at the earliest.
            sent[place] = now if campaign.finish_time is None else campaign.launch_time or now
        elif reply.message_id is None and address_hash in tried[place] and not ("failed" in signals and signals <= _UNREACHED):
            sent[place] = tried[place][address_hash]
    if not sent:
        return None
    last = max(sent, key=lambda place: sent[place])
    return campaigns[last.campaign_id], chunk_of(last.slot) * CHUNK + last.position


async def apply_standings(conn: AsyncConnection, channel: str, standings: Sequence[Standing], app_id: int | None = None) -> int:
    """Change the subscriptions of everybody who has one of these addresses, in this order; how many were."""
    changed = 0
    for standing in standings:
        address_hash = hash_address(standing.address.key)
        changes: Mapping[int, list[tuple[int, str, bytes, str, str]]] = defaultdict(list)
        for subscriber in await _find_subscribers(conn, channel, address_hash, app_id):
            if standing.state == "opted_out":
                reason = f"{ReasonClass.OPTED_OUT}/{standing.reason[:64]}"
            elif subscriber.state == "opted_out" and subscriber.reason.startswith(f"{ReasonClass.OPTED_OUT}/"):
                # A provider repeats what nobody took, for days: an older word does not undo a newer one.
                if standing.time is not None and standing.time + _TOLERANCE < subscriber.update_time:
                    continue
                reason = ""
            else:
                # It was not the provider who told of it.
                continue
            if subscriber.state != standing.state:
                changes[subscriber.app_id].append((subscriber.number, channel, address_hash, standing.state, reason))
        for owner, own in sorted(changes.items()):
            await set_states(conn, owner, own)
            changed += len(own)
    return changed


async def _find_subscribers(conn: AsyncConnection, channel: str, address_hash: bytes, app_id: int | None) -> list[Subscriber]:
    """Who may have been spoken to: people of the app whose own account it is, or of those that share the server's."""
    found = await find_subscribers(conn, channel, address_hash, app_id)
    owners = await list_owners(conn, channel) if found and app_id is None else ()
    return [subscriber for subscriber in found if subscriber.app_id not in owners]
