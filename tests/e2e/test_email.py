"""Email arrives by being installed: its row and column work, its events count, and one click ends it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from aftertouch.rpc.values import to_struct
from aftertouch.v1 import campaigns_pb2, channels_pb2, contacts_pb2, retargeting_pb2
from tests.fix_world import OpenWorld, World

sys.path[:0] = [str(Path(__file__).parents[2] / "plugins" / "aftertouch-email" / folder) for folder in ("", "tests")]
aiosmtpd = pytest.importorskip("aiosmtpd", reason="the email channel's own dependencies are not installed")

from aftertouch_email import EmailChannel  # noqa: E402
from smtp import SmtpProvider  # noqa: E402
from test_email_contract import WEBHOOK_KEY, sign_events  # noqa: E402

from aftertouch.testing import Response  # noqa: E402

CONTENT = {"subject": "Sale, {{ first_name }}", "text": "Ends tonight", "html": "<p>Ends <b>tonight</b></p>"}


async def post(world: World, *events: dict[str, Any]) -> int:
    signed = sign_events(world.core.registry.channels["email"], *events)
    url = f"http://{world.addresses.http}/v1/webhooks/email"
    async with aiohttp.ClientSession() as http, http.post(url, data=signed.body, headers=dict(signed.headers)) as answer:
        await world.wait_until_stored()
        return answer.status


async def test_email_is_sent_heard_of_followed_up_and_ended(open_world: OpenWorld) -> None:
    async with SmtpProvider(lambda _: Response(status=250, body="2.0.0 Ok")) as provider:
        environment = {
            "AFTERTOUCH_EMAIL_HOST": "127.0.0.1",
            "AFTERTOUCH_EMAIL_PORT": provider.url,
            "AFTERTOUCH_EMAIL_SECURITY": "none",
            "AFTERTOUCH_EMAIL_SENDER": "Shop <news@shop.example>",
            "AFTERTOUCH_EMAIL_UNSUBSCRIBE_SECRET": "a secret of 32 characters or more",
            "AFTERTOUCH_EMAIL_WEBHOOK_KEY": WEBHOOK_KEY,
        }
        async with open_world(environment=environment, extra=[EmailChannel]) as world:
            people = []
            for number in range(5):
                person = contacts_pb2.Contact(external_id=f"p{number}", attributes=to_struct({"first_name": f"P{number}"}))
                person.subscriptions.add(channel="email").address.update({"email": f"p{number}@home.example"})
                person.subscriptions.add(channel="sms").address.update({"phone": f"+3460000001{number}"})
                people.append(person)
            request = contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=people)
            await world.client.contacts.UpsertContacts(request)
            everybody = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
            sale = campaigns_pb2.Campaign(display_name="Sale", channel="email", content=to_struct(CONTENT), audience=everybody)
            made = campaigns_pb2.CreateCampaignRequest(parent=world.client.parent, campaign=sale)
            sale = await world.client.campaigns.CreateCampaign(made)
            await world.launch(sale.name)

            mails = {request.url.removeprefix("mailto:")[:2]: request.body.decode() for request in provider.requests}
            assert set(mails) == {f"p{number}" for number in range(5)}
            tokens = {
                person: json.loads(re.search(r"^X-SMTPAPI: (.*)$", mail, re.MULTILINE)[1])["unique_args"]["aftertouch_token"]  # type: ignore[index]
                for person, mail in mails.items()
            }
            events = [{"event": "delivered", "aftertouch_token": tokens[person]} for person in ("p0", "p1", "p2")]
            events += [{"event": "open", "aftertouch_token": tokens["p0"]}, {"event": "click", "aftertouch_token": tokens["p0"]}]
            events += [{"event": "bounce", "type": "bounce", "status": "5.1.1", "aftertouch_token": tokens["p3"]}]
            assert [await post(world, *events), await post(world, *events)] == [204, 204]

            unsubscribe = re.search(r"^List-Unsubscribe: <https?://[^/]+(.*)>$", mails["p2"].replace("\r", ""), re.MULTILINE)
            assert unsubscribe is not None
            async with aiohttp.ClientSession() as http:
                url = f"http://{world.addresses.http}{unsubscribe[1]}"
                async with http.get(url) as shown, http.post(url, data="List-Unsubscribe=One-Click") as done:
                    assert (shown.status, done.status) == (200, 200)

            counts = dict((await world.get_campaign(sale.name)).counts.signals)
            assert {name: counts.get(name) for name in ("sent", "delivered", "opened", "clicked", "unsubscribed")} == {
                "sent": 5,
                "delivered": 3,
                "opened": 1,
                "clicked": 1,
                "unsubscribed": 1,
            }
            listed = await world.client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=sale.name))
            assert {one.action.action: (one.count, one.apart_count) for one in listed.actions} == {
                "opened": (1, 0),
                "not_opened": (2, 0),
                "clicked": (1, 0),
                "not_clicked": (2, 0),
                "not_delivered": (1, 1),
                "delivered": (3, 0),
                "unclear": (0, 0),
            }

            async def preview(source: str, action: str, channel: str) -> int:
                selection = campaigns_pb2.RetargetSelection(source=source, action=action)
                asked = retargeting_pb2.PreviewRetargetRequest(selection=selection, channel=channel)
                return (await world.client.retargeting.PreviewRetarget(asked)).audience_count

            assert await preview(sale.name, "not_opened", "sms") == 2
            # Of the two who did not open it, one unsubscribed meanwhile.
            assert await preview(sale.name, "not_opened", "email") == 1
            text = await world.create_campaign("sms")
            await world.launch(text.name)
            # One unsubscribed, and one mailbox does not exist.
            assert await preview(text.name, "sent", "email") == 3
            spam = {"event": "spamreport", "aftertouch_token": tokens["p0"], "email": "P0@home.example"}
            assert await post(world, spam) == 204
            assert await preview(text.name, "sent", "email") == 2
            assert (await world.get_campaign(sale.name)).counts.signals["complained"] == 1


async def test_app_sends_mail_by_a_mailbox_of_its_own_where_the_server_has_none(open_world: OpenWorld) -> None:
    async with SmtpProvider(lambda _: Response(status=250, body="2.0.0 Ok")) as provider:
        environment = {
            "AFTERTOUCH_EMAIL_HOST": "127.0.0.1",
            "AFTERTOUCH_EMAIL_PORT": provider.url,
            "AFTERTOUCH_EMAIL_SECURITY": "none",
        }
        async with open_world(environment=environment, extra=[EmailChannel]) as world:
            own = {"sender": "Acme <news@acme.example>", "unsubscribe_secret": "a secret of Acme's, 32 characters long"}
            settings = channels_pb2.ChannelSettings(name="apps/acme/channelSettings/email", values=own)
            given = channels_pb2.UpdateChannelSettingsRequest(channel_settings=settings)
            await world.client.channels.UpdateChannelSettings(given)
            person = contacts_pb2.Contact(external_id="ada", attributes=to_struct({"first_name": "Ada"}))
            person.subscriptions.add(channel="email").address.update({"email": "ada@home.example"})
            request = contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=[person])
            await world.client.contacts.UpsertContacts(request)
            everybody = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
            sale = campaigns_pb2.Campaign(display_name="Sale", channel="email", content=to_struct(CONTENT), audience=everybody)
            made = campaigns_pb2.CreateCampaignRequest(parent=world.client.parent, campaign=sale)
            sale = await world.client.campaigns.CreateCampaign(made)
            await world.launch(sale.name)
            (request_seen,) = provider.requests
            mail = request_seen.body.decode().replace("\r", "")
            assert "From: Acme <news@acme.example>" in mail
            unsubscribe = re.search(r"^List-Unsubscribe: <https?://[^/]+(.*)>$", mail, re.MULTILINE)
            assert unsubscribe is not None
            assert unsubscribe[1].startswith("/v1/apps/acme/webhooks/email/")
            url = f"http://{world.addresses.http}{unsubscribe[1]}"
            async with aiohttp.ClientSession() as http, http.post(url, data="List-Unsubscribe=One-Click") as done:
                assert done.status == 200
            assert (await world.get_campaign(sale.name)).counts.signals["unsubscribed"] == 1
