"""Five minutes with the Python client: a sale by WhatsApp, and an SMS to those who did not read it.

Start ``aftertouch serve --sandbox``, then run this with the key that it prints in AFTERTOUCH_API_KEY.
"""

from __future__ import annotations

# --8<-- [start:journey]
import asyncio
import os

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from aftertouch.client import Client
from aftertouch.v1.campaigns_pb2 import (
    AllSubscribers,
    Audience,
    Campaign,
    CreateCampaignRequest,
    GetCampaignRequest,
    LaunchCampaignRequest,
    RetargetSelection,
    UpdateCampaignRequest,
)
from aftertouch.v1.retargeting_pb2 import CreateRetargetRequest, ListActionsRequest, PreviewRetargetRequest


async def send(client: Client, name: str) -> Campaign:
    """Launch a campaign and wait until everybody was dealt with."""
    campaign = await client.campaigns.LaunchCampaign(LaunchCampaignRequest(name=name))
    while campaign.state == Campaign.SENDING:
        await asyncio.sleep(0.5)
        campaign = await client.campaigns.GetCampaign(GetCampaignRequest(name=name))
    print(f"{campaign.display_name}: {Campaign.State.Name(campaign.state)}, {campaign.counts.recipients} people")
    return campaign


async def main() -> None:
    address = os.environ.get("AFTERTOUCH_ADDRESS", "127.0.0.1:7070")
    async with Client(address, api_key=os.environ["AFTERTOUCH_API_KEY"], app="sandbox") as client:
        template = {"template": "winter_sale", "language": "en_US", "body": ["{{ first_name | default: 'there' }}"]}
        content = ParseDict(template, Struct())
        everybody = Audience(all_subscribers=AllSubscribers())
        sale = await client.campaigns.CreateCampaign(
            CreateCampaignRequest(
                parent=client.parent,
                campaign=Campaign(display_name="Winter Sale", channel="whatsapp", content=content, audience=everybody),
            )
        )
        await send(client, sale.name)
        await asyncio.sleep(3)  # the sandbox's people read within some two seconds

        actions = await client.retargeting.ListActions(ListActionsRequest(parent=sale.name))
        for counted in actions.actions:
            print(f"{counted.action.display_name}: {counted.count}")

        who = RetargetSelection(source=sale.name, action="not_read")
        preview = await client.retargeting.PreviewRetarget(PreviewRetargetRequest(selection=who, channel="sms"))
        print(f"{preview.matched_count} did not read it, {preview.audience_count} of them can be reached by SMS")

        wave = await client.retargeting.CreateRetarget(CreateRetargetRequest(selection=who, channel="sms"))
        reminder = ParseDict({"body": "{{ first_name | default: 'Hello' }}, the sale ends tonight"}, Struct())
        await client.campaigns.UpdateCampaign(UpdateCampaignRequest(campaign=Campaign(name=wave.name, content=reminder)))
        await send(client, wave.name)


asyncio.run(main())
# --8<-- [end:journey]
