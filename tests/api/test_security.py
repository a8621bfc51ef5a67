"""Every way in, tried by those who may not: callers without the right key, forged webhooks, and addresses inside a network."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import aiohttp
import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from sqlalchemy import func, select
from twilio.request_validator import RequestValidator
from yarl import URL

from aftertouch.client import Client
from aftertouch.rpc.interceptor import Method
from aftertouch.rpc.server import SERVICES
from aftertouch.rpc.values import to_struct
from aftertouch.store.apps import find_app
from aftertouch.store.campaigns import find_campaign
from aftertouch.store.engine import transaction
from aftertouch.store.tables import contact_ids, events, receipts, unrecognized_receipts
from aftertouch.v1 import (
    apps_pb2,
    campaigns_pb2,
    channels_pb2,
    contacts_pb2,
    events_pb2,
    lists_pb2,
    options_pb2,
    retargeting_pb2,
)
from aftertouch.web import ingress
from tests.fix_world import World
from tests.refusals import Refusal, refuse

METHODS = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
SCOPES = ("read", "ingest", "manage", "admin")
INCLUDES = {"read": {"read"}, "ingest": {"ingest"}, "manage": {"read", "ingest", "manage"}, "admin": set(SCOPES)}


def scope_of(path: str) -> str:
    return Method(path).scope.removeprefix("SCOPE_").lower()


class RawCaller:
    """Calls any method with any bytes, as no generated stub would."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])

    def call(self, path: str, data: bytes, *metadata: tuple[str, str]) -> Awaitable[bytes]:
        if path in METHODS and METHODS[path].server_streaming:
            return self.channel.stream_stream(path)(iter([data]), metadata=metadata).read()
        if path in METHODS and METHODS[path].client_streaming:
            return self.channel.stream_unary(path)(iter([data]), metadata=metadata)
        return self.channel.unary_unary(path)(data, metadata=metadata)

    async def refuse(self, path: str, data: bytes, secret: str = "") -> Refusal:
        return await refuse(self.call(path, data, *([("authorization", f"Bearer {secret}")] if secret else [])))


@pytest.fixture(scope="module")
async def raw(shared_world: World) -> AsyncIterator[RawCaller]:
    caller = RawCaller(shared_world.addresses.grpc)
    yield caller
    await caller.channel.close()


# Keys


@pytest.mark.parametrize("path", METHODS)
async def test_call_without_a_key_is_refused(raw: RawCaller, path: str) -> None:
    refusal = await raw.refuse(path, b"")
    assert (refusal.code, refusal.reason) == ("UNAUTHENTICATED", "API_KEY_MISSING")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic YWRtaW46YWRtaW4=", "Token x"])
async def test_header_without_a_bearer_counts_as_no_key(raw: RawCaller, header: str) -> None:
    refusal = await refuse(raw.call("/aftertouch.v1.Apps/GetApp", b"", ("authorization", header)))
    assert refusal.reason == "API_KEY_MISSING"


@pytest.mark.parametrize("path", METHODS)
async def test_call_with_a_wrong_key_is_refused(raw: RawCaller, shared_world: World, path: str) -> None:
    right = shared_world.secret
    public = right.split("_")[1]
    wrong = [
        right[:-1] + ("A" if right[-1] != "A" else "B"),
        right + "A",
        right.removeprefix("at_"),
        f"at_{public}_",
        f"at_{public}",
        "at__",
        "' or 1=1 --",
        "x" * 4000,
    ]
    for secret in wrong:
        refusal = await raw.refuse(path, b"", secret)
        assert (refusal.code, refusal.reason) == ("UNAUTHENTICATED", "API_KEY_INVALID"), secret


@pytest.mark.parametrize("path", METHODS)
async def test_revoked_key_is_refused_from_the_next_call_on(raw: RawCaller, shared_world: World, path: str) -> None:
    secret = await shared_world.create_key("acme", "admin")
    client = shared_world.client
    await client.apps.DeleteApiKey(apps_pb2.DeleteApiKeyRequest(name=client.name("apiKeys", secret.split("_")[1])))
    assert (await raw.refuse(path, b"", secret)).reason == "API_KEY_INVALID"


@pytest.mark.parametrize("scope", SCOPES)
async def test_scope_admits_to_its_methods_and_to_no_others(raw: RawCaller, shared_world: World, scope: str) -> None:
    secret = await shared_world.create_key("acme", scope)
    for path in METHODS:
        wanted = scope_of(path)
        if wanted in INCLUDES[scope]:
            # Field 1 is parent or name everywhere it matters; garbage gets past the key, and no further.
            assert (await raw.refuse(path, b"\xff", secret)).reason == "FIELDS_INVALID", path
        else:
            refusal = await raw.refuse(path, b"", secret)
            assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "SCOPE_INSUFFICIENT")
            assert refusal.metadata == {"required_scope": f"SCOPE_{wanted.upper()}", "method": path}


async def test_key_of_two_scopes_may_do_both(raw: RawCaller, shared_world: World) -> None:
    secret = await shared_world.create_key("acme", "read", "ingest")
    reasons = {path: (await raw.refuse(path, b"\xff", secret)).reason for path in METHODS}
    assert {path for path, reason in reasons.items() if reason == "FIELDS_INVALID"} == {
        path for path in METHODS if scope_of(path) in ("read", "ingest")
    }


# Another app


@dataclass
class Rival:
    """Another app's client, and what it tries to reach."""

    client: Client
    names: Mapping[str, str]


@pytest.fixture(scope="module")
async def rival(shared_world: World) -> AsyncIterator[Rival]:
    owner = shared_world.client
    campaign = await shared_world.create_campaign("sms")
    await shared_world.launch(campaign.name)
    draft = await shared_world.create_campaign("sms")
    key = await owner.apps.CreateApiKey(
        apps_pb2.CreateApiKeyRequest(
            parent=owner.parent, api_key=apps_pb2.ApiKey(display_name="victim", scopes=[options_pb2.SCOPE_READ])
        )
    )
    members = await owner.lists.CreateList(
        lists_pb2.CreateListRequest(parent=owner.parent, list_id="victims", list=lists_pb2.List(display_name="Victims"))
    )
    (contact,) = (await owner.contacts.ListContacts(contacts_pb2.ListContactsRequest(parent=owner.parent, page_size=1))).contacts
    secret = await shared_world.create_key("rival", "admin")
    names = {"app": owner.parent, "campaign": campaign.name, "draft": draft.name, "key": key.name, "contact": contact.name}
    names |= {"list": members.name, "settings": f"{owner.parent}/channelSettings/sms"}
    async with shared_world.connect("rival", secret) as client:
        yield Rival(client, names)


def trespass(client: Client, names: Mapping[str, str]) -> dict[str, Awaitable[Any]]:
    """A call of every method that takes a name, with names of another app."""
    app, sent, draft = names["app"], names["campaign"], names["draft"]
    selection = campaigns_pb2.RetargetSelection(source=sent, action="delivered")
    campaign = campaigns_pb2.Campaign(display_name="x", channel="sms")
    key = apps_pb2.ApiKey(display_name="x", scopes=[options_pb2.SCOPE_READ])
    contact = contacts_pb2.Contact(external_id="intruder")
    question = contacts_pb2.ExplainContactRequest(name=names["contact"], campaign=sent)
    made = lists_pb2.CreateListRequest(parent=app, list_id="intruder", list=lists_pb2.List(display_name="x"))
    members = {"name": names["list"], "contacts": ["intruder"]}
    rows = contacts_pb2.ImportContactsRequest(parent=app, contacts=[contact])
    settings = names["settings"]
    own = channels_pb2.ChannelSettings(name=settings, values={"auth_token": "mine now"})
    opening = events_pb2.StreamEventsRequest(open=events_pb2.OpenStream(parent=app, producer="intruder"))
    return {
        "UpdateApp": client.apps.UpdateApp(apps_pb2.UpdateAppRequest(app=apps_pb2.App(name=app, display_name="mine now"))),
        "GetApp": client.apps.GetApp(apps_pb2.GetAppRequest(name=app)),
        "CreateApiKey": client.apps.CreateApiKey(apps_pb2.CreateApiKeyRequest(parent=app, api_key=key)),
        "ListApiKeys": client.apps.ListApiKeys(apps_pb2.ListApiKeysRequest(parent=app)),
        "DeleteApiKey": client.apps.DeleteApiKey(apps_pb2.DeleteApiKeyRequest(name=names["key"])),
        "CreateIdentitySecret": client.apps.CreateIdentitySecret(apps_pb2.CreateIdentitySecretRequest(parent=app)),
        "GetChannelSettings": client.channels.GetChannelSettings(channels_pb2.GetChannelSettingsRequest(name=settings)),
        "ListTemplates": client.channels.ListTemplates(channels_pb2.ListTemplatesRequest(parent=app, channel="sms")),
        "UpdateChannelSettings": client.channels.UpdateChannelSettings(
            channels_pb2.UpdateChannelSettingsRequest(channel_settings=own)
        ),
        "DeleteChannelSettings": client.channels.DeleteChannelSettings(channels_pb2.DeleteChannelSettingsRequest(name=settings)),
        "ImportContacts": client.contacts.ImportContacts(iter([rows])),
        "UpsertContacts": client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=app, contacts=[contact])),
        "GetContact": client.contacts.GetContact(contacts_pb2.GetContactRequest(name=names["contact"])),
        "ListContacts": client.contacts.ListContacts(contacts_pb2.ListContactsRequest(parent=app)),
        "ListContactCampaigns": client.contacts.ListContactCampaigns(
            contacts_pb2.ListContactCampaignsRequest(parent=names["contact"])
        ),
        "ExplainContact": client.contacts.ExplainContact(question),
        "EraseContact": client.contacts.EraseContact(contacts_pb2.EraseContactRequest(name=names["contact"])),
        "CreateList": client.lists.CreateList(made),
        "GetList": client.lists.GetList(lists_pb2.GetListRequest(name=names["list"])),
        "ListLists": client.lists.ListLists(lists_pb2.ListListsRequest(parent=app)),
        "DeleteList": client.lists.DeleteList(lists_pb2.DeleteListRequest(name=names["list"])),
        "AddListContacts": client.lists.AddListContacts(lists_pb2.AddListContactsRequest(**members)),
        "ImportListContacts": client.lists.ImportListContacts(iter([lists_pb2.ImportListContactsRequest(**members)])),
        "ExportListContacts": client.lists.ExportListContacts(lists_pb2.ExportListContactsRequest(name=names["list"])).read(),
        "RemoveListContacts": client.lists.RemoveListContacts(lists_pb2.RemoveListContactsRequest(**members)),
        "CreateCampaign": client.campaigns.CreateCampaign(campaigns_pb2.CreateCampaignRequest(parent=app, campaign=campaign)),
        "GetCampaign": client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=sent)),
        "ListCampaigns": client.campaigns.ListCampaigns(campaigns_pb2.ListCampaignsRequest(parent=app)),
        "UpdateCampaign": client.campaigns.UpdateCampaign(
            campaigns_pb2.UpdateCampaignRequest(campaign=campaigns_pb2.Campaign(name=draft, display_name="mine now"))
        ),
        "DeleteCampaign": client.campaigns.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=draft)),
        "LaunchCampaign": client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=draft)),
        "UnscheduleCampaign": client.campaigns.UnscheduleCampaign(campaigns_pb2.UnscheduleCampaignRequest(name=draft)),
        "PauseCampaign": client.campaigns.PauseCampaign(campaigns_pb2.PauseCampaignRequest(name=sent)),
        "CancelCampaign": client.campaigns.CancelCampaign(campaigns_pb2.CancelCampaignRequest(name=sent)),
        "WatchCampaign": client.campaigns.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=sent)).read(),
        "SendTest": client.campaigns.SendTest(campaigns_pb2.SendTestRequest(name=draft, contact=names["contact"])),
        "ResumeCampaign": client.campaigns.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=sent)),
        "ListRecipients": client.campaigns.ListRecipients(campaigns_pb2.ListRecipientsRequest(parent=sent)),
        "ExportRecipients": client.campaigns.ExportRecipients(campaigns_pb2.ExportRecipientsRequest(parent=sent)).read(),
        "IngestEvents": client.events.IngestEvents(
            events_pb2.IngestEventsRequest(parent=app, events=[events_pb2.Event(token="x", signal="delivered")])
        ),
        "StreamEvents": client.events.StreamEvents(iter([opening])).read(),
        "WatchEvents": client.events.WatchEvents(events_pb2.WatchEventsRequest(parent=app)).read(),
        "GetActivity": client.events.GetActivity(events_pb2.GetActivityRequest(campaign=sent)),
        "ListActions": client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=sent)),
        "PreviewRetarget": client.retargeting.PreviewRetarget(
            retargeting_pb2.PreviewRetargetRequest(selection=selection, channel="sms")
        ),
        "GetMatrix": client.retargeting.GetMatrix(retargeting_pb2.GetMatrixRequest(name=sent)),
        "ListRetargetContacts": client.retargeting.ListRetargetContacts(
            retargeting_pb2.ListRetargetContactsRequest(selection=selection, channel="sms")
        ).read(),
        "CreateFollowUps": client.retargeting.CreateFollowUps(
            retargeting_pb2.CreateFollowUpsRequest(
                source=sent,
                steps=[
                    retargeting_pb2.FollowUpStep(
                        selection=campaigns_pb2.RetargetSelection(action="delivered"),
                        channel="sms",
                        content=to_struct({"body": "x"}),
                    )
                ],
            )
        ),
        "GetChainReport": client.retargeting.GetChainReport(retargeting_pb2.GetChainReportRequest(name=sent)),
        "CreateRetarget": client.retargeting.CreateRetarget(
            retargeting_pb2.CreateRetargetRequest(selection=selection, channel="sms")
        ),
    }


async def test_names_of_another_app_do_not_exist_on_any_method(rival: Rival) -> None:
    calls = trespass(rival.client, rival.names)
    nameless = {"ListChannels", "GetChannel"}
    assert calls.keys() | nameless == {path.rpartition("/")[2] for path in METHODS}
    for method, call in calls.items():
        refusal = await refuse(call)
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND"), method
        assert refusal.metadata["resource"] in rival.names.values(), method


async def test_names_of_another_app_do_not_exist_inside_an_audience(rival: Rival) -> None:
    client = rival.client
    given = campaigns_pb2.GivenContacts(contacts=[rival.names["contact"]])
    retarget = campaigns_pb2.RetargetSelection(source=rival.names["campaign"], action="delivered")
    for audience in (
        campaigns_pb2.Audience(given_contacts=given),
        campaigns_pb2.Audience(retarget=retarget),
        campaigns_pb2.Audience(list=rival.names["list"]),
    ):
        campaign = campaigns_pb2.Campaign(display_name="x", channel="sms", audience=audience)
        call = client.campaigns.CreateCampaign(campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=campaign))
        assert (await refuse(call)).reason == "RESOURCE_NOT_FOUND"


async def test_names_of_another_app_cannot_be_told_from_names_that_nobody_has(rival: Rival) -> None:
    for name in (rival.names["campaign"], "apps/acme/campaigns/never-made", "apps/nobody/campaigns/x"):
        refusal = await refuse(rival.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name)))
        assert (refusal.reason, refusal.metadata) == ("RESOURCE_NOT_FOUND", {"resource": name})


async def test_trespassing_changed_nothing(rival: Rival, shared_world: World) -> None:
    for call in trespass(rival.client, rival.names).values():
        await refuse(call)
    draft = await shared_world.get_campaign(rival.names["draft"])
    assert (draft.display_name, draft.state) == ("Summer Sale", campaigns_pb2.Campaign.State.DRAFT)
    keys = await shared_world.client.apps.ListApiKeys(apps_pb2.ListApiKeysRequest(parent="apps/acme", page_size=1000))
    assert not next(key for key in keys.api_keys if key.name == rival.names["key"]).HasField("revoke_time")
    missing = await refuse(
        shared_world.client.contacts.GetContact(contacts_pb2.GetContactRequest(name="apps/acme/contacts/intruder"))
    )
    assert missing.reason == "RESOURCE_NOT_FOUND"


# Malformed requests


@pytest.mark.parametrize("path", METHODS)
async def test_bytes_that_are_no_message_are_refused(raw: RawCaller, shared_world: World, path: str) -> None:
    for data in (b"\xff\xff\xff\xff", b"\x0a\x7f", b"\x0a\x02\xff\xfe" if takes_text_first(path) else b"\x07"):
        refusal = await raw.refuse(path, data, shared_world.secret)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "FIELDS_INVALID"), data


def takes_text_first(path: str) -> bool:
    first = METHODS[path].input_type.fields_by_number[1]
    return bool(first.type == first.TYPE_STRING)


@pytest.mark.parametrize("path", METHODS)
async def test_request_above_4_mb_is_refused_with_the_limit(raw: RawCaller, shared_world: World, path: str) -> None:
    refusal = await raw.refuse(path, b"\x0a\x80\x80\x80\x02" + bytes(4 << 20), shared_world.secret)
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    assert refusal.metadata == {"limit_bytes": "4194304"}


@pytest.mark.parametrize("path", ["/aftertouch.v1.Campaigns/StealCampaign", "/aftertouch.v2.Campaigns/GetCampaign", "/x/y", "/x"])
async def test_unknown_method_is_named(raw: RawCaller, path: str) -> None:
    refusal = await raw.refuse(path, b"")
    assert (refusal.code, refusal.reason, refusal.metadata) == ("UNIMPLEMENTED", "METHOD_UNKNOWN", {"method": path})


def list_text_fields(message: Message) -> list[str]:
    return [field.name for field in message.DESCRIPTOR.fields if field.type == field.TYPE_STRING and not field.is_repeated]


@pytest.mark.parametrize("path", [path for path in METHODS if not path.endswith(("/ImportContacts", "/ImportListContacts"))])
async def test_nul_in_any_text_is_refused_and_never_a_defect(raw: RawCaller, shared_world: World, path: str) -> None:
    request_class = GetMessageClass(METHODS[path].input_type)
    for field in list_text_fields(request_class()):
        request = request_class(**{field: "apps/acme/campaigns/x\0"})
        refusal = await raw.refuse(path, request.SerializeToString(), shared_world.secret)
        assert refusal.reason == "FIELDS_INVALID"
        assert "U+0000" in refusal.fields[field]


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"body": "a\0b"}, "campaign.content.body"),
        ({"body": ["x", {"y": "\0"}]}, "campaign.content.body[1].y"),
        ({"bo\0dy": "x"}, "campaign.content"),
        ({"body": float("nan")}, "campaign.content.body"),
        ({"body": float("inf")}, "campaign.content.body"),
    ],
)
@pytest.mark.parametrize("verb", ["create", "update"])
async def test_content_that_cannot_be_stored_is_refused(shared_world: World, content: Any, path: str, verb: str) -> None:
    client = shared_world.client
    if verb == "create":
        campaign = campaigns_pb2.Campaign(display_name="x", channel="sms", content=to_struct(content))
        call = client.campaigns.CreateCampaign(campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=campaign))
    else:
        draft = await shared_world.create_campaign("sms")
        changed = campaigns_pb2.Campaign(name=draft.name, content=to_struct(content))
        call = client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=changed))
    assert path in (await refuse(call)).fields


async def test_content_may_speak_of_u0000(shared_world: World) -> None:
    body = r"the text \u0000 has six characters"
    client = shared_world.client
    campaign = campaigns_pb2.Campaign(display_name="x", channel="sms", content=to_struct({"body": body}))
    made = await client.campaigns.CreateCampaign(campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=campaign))
    assert made.content["body"] == body


@pytest.mark.parametrize(
    "name",
    ["", "acme", "apps", "apps/", "apps//campaigns/x", "apps/acme/campaigns/", "apps/acme/contacts/x", "apps/acme/campaigns/x/y"],
)
async def test_name_of_another_form_is_a_field_error(shared_world: World, name: str) -> None:
    refusal = await refuse(shared_world.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name)))
    assert (refusal.reason, list(refusal.fields)) == ("FIELDS_INVALID", ["name"])


async def test_health_and_reflection_need_no_key(raw: RawCaller) -> None:
    assert await raw.call("/grpc.health.v1.Health/Check", b"") == b"\x08\x01"


# Webhooks


@dataclass
class Hooks:
    """The webhook addresses of a server, over a socket."""

    world: World
    session: aiohttp.ClientSession
    tokens: Mapping[str, str]
    """A token of the first recipient of an sms, whatsapp and push campaign."""

    def url(self, channel: str, rest: str = "") -> str:
        return f"{self.world.addresses.public_url}/v1/webhooks/{channel}{rest}"

    async def count_rows(self) -> list[int]:
        async with transaction(self.world.core.engine) as conn:
            return [
                (await conn.execute(select(func.count()).select_from(table))).scalar_one()
                for table in (events, receipts, unrecognized_receipts)
            ]

    async def send(self, method: str, url: str | URL, data: Any = None, **headers: str) -> tuple[int, str]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, url, data=data, headers=named) as response:
            return response.status, await response.text()

    def sign_sms(self, url: str, form: Mapping[str, str]) -> dict[str, str]:
        validator = RequestValidator(self.world.sandbox.settings.auth_token)
        return {"x_twilio_signature": validator.compute_signature(url, dict(form)), **FORM}

    def sign_whatsapp(self, body: bytes) -> dict[str, str]:
        digest = hmac.new(self.world.sandbox.settings.app_secret.encode(), body, hashlib.sha256).hexdigest()
        return {"x_hub_signature_256": f"sha256={digest}", "content_type": "application/json"}


FORM = {"content_type": "application/x-www-form-urlencoded"}
DELIVERED = {"MessageSid": "SM" + "0" * 32, "MessageStatus": "delivered"}


def write_status(token: str, **fields: Any) -> bytes:
    status = {"id": "wamid.x", "status": "read", "timestamp": "1790000000", "biz_opaque_callback_data": token, **fields}
    change = {"field": "messages", "value": {"statuses": [status]}}
    return json.dumps({"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [change]}]}).encode()


@pytest.fixture(scope="module")
async def hooks(shared_world: World) -> AsyncIterator[Hooks]:
    async with transaction(shared_world.core.engine) as conn:
        app = await find_app(conn, "acme")
    assert app is not None
    codec, tokens = shared_world.core.ledger.tokens, {}
    for channel in ("sms", "whatsapp", "push"):
        made = await shared_world.create_campaign(channel)
        await shared_world.launch(made.name)
        async with transaction(shared_world.core.engine) as conn:
            campaign = await find_campaign(conn, app.app_id, made.name.rpartition("/")[2])
        assert campaign is not None
        tokens[channel] = codec.make(campaign.campaign_id, np.array([0]))[0]
    async with aiohttp.ClientSession() as session:
        yield Hooks(shared_world, session, tokens)


@pytest.fixture
async def untouched(hooks: Hooks) -> AsyncIterator[Hooks]:
    """The hooks; whatever the test does must store nothing."""
    before = await hooks.count_rows()
    yield hooks
    assert await hooks.count_rows() == before


def swap_last(text: str) -> str:
    return text[:-1] + ("A" if text[-1] != "A" else "B")


Forge = Callable[[Hooks], tuple[str, str, Any, dict[str, str]]]


def forge_sms(change: Callable[[str, dict[str, str], dict[str, str]], tuple[str, dict[str, str], dict[str, str]]]) -> Forge:
    def forge(hooks: Hooks) -> tuple[str, str, Any, dict[str, str]]:
        url = hooks.url("sms", f"?t={hooks.tokens['sms']}")
        url, form, headers = change(url, dict(DELIVERED), hooks.sign_sms(url, DELIVERED))
        return "POST", url, urlencode(form).encode(), headers

    return forge


FORGED_SMS = {
    "no signature": forge_sms(lambda url, form, headers: (url, form, dict(FORM))),
    "empty signature": forge_sms(lambda url, form, headers: (url, form, {**headers, "x_twilio_signature": ""})),
    "wrong signature": forge_sms(
        lambda url, form, headers: (url, form, {**headers, "x_twilio_signature": base64.b64encode(bytes(20)).decode()})
    ),
    "tampered status": forge_sms(lambda url, form, headers: (url, {**form, "MessageStatus": "undelivered"}, headers)),
    "added field": forge_sms(lambda url, form, headers: (url, {**form, "ErrorCode": "21610"}, headers)),
    "tampered token": forge_sms(lambda url, form, headers: (swap_last(url), form, headers)),
    "added query": forge_sms(lambda url, form, headers: (f"{url}&t=x", form, headers)),
    "other path": forge_sms(lambda url, form, headers: (url.replace("/sms?", "/sms/x?"), form, headers)),
}


@pytest.mark.parametrize("forge", FORGED_SMS.values(), ids=FORGED_SMS.keys())
async def test_sms_webhook_forged_is_refused(untouched: Hooks, forge: Forge) -> None:
    method, url, data, headers = forge(untouched)
    assert await untouched.send(method, url, data, **headers) == (403, "the signature is wrong")


async def test_sms_webhook_with_another_accounts_key_is_refused(untouched: Hooks) -> None:
    url = untouched.url("sms", f"?t={untouched.tokens['sms']}")
    signature = RequestValidator("another token").compute_signature(url, DELIVERED)
    status, _ = await untouched.send("POST", url, urlencode(DELIVERED).encode(), x_twilio_signature=signature, **FORM)
    assert status == 403


async def test_whatsapp_webhook_forged_is_refused(untouched: Hooks) -> None:
    body = write_status(untouched.tokens["whatsapp"])
    signed = untouched.sign_whatsapp(body)
    sha1 = hmac.new(untouched.world.sandbox.settings.app_secret.encode(), body, hashlib.sha1).hexdigest()
    forged = [
        (body, {}),
        (body, {"x_hub_signature_256": ""}),
        (body, {"x_hub_signature_256": swap_last(signed["x_hub_signature_256"])}),
        (body, {"x_hub_signature_256": signed["x_hub_signature_256"].removeprefix("sha256=")}),
        (body, {"x_hub_signature": f"sha1={sha1}"}),
        (body.replace(b"read", b"sent"), signed),
        (body + b" ", signed),
        (body.replace(untouched.tokens["whatsapp"].encode(), untouched.tokens["push"].encode()), signed),
    ]
    for data, headers in forged:
        assert await untouched.send("POST", untouched.url("whatsapp"), data, **headers) == (403, "the signature is wrong")


async def test_whatsapp_registration_with_a_wrong_word_is_refused(untouched: Hooks) -> None:
    for word in ("", "x", "sandbox-verify-tokem"):
        query = urlencode({"hub.mode": "subscribe", "hub.challenge": "<script>", "hub.verify_token": word})
        status, text = await untouched.send("GET", untouched.url("whatsapp", f"?{query}"))
        assert (status, text) == (403, "the signature is wrong")


@pytest.mark.parametrize("event", ["confirmed", "clicked", "dismissed"])
async def test_push_beacon_with_a_made_up_token_is_refused(untouched: Hooks, event: str) -> None:
    token = untouched.tokens["push"]
    for made in (swap_last(token), token.swapcase(), "A" * 24, "_" * 24):
        answer = await untouched.send("POST", untouched.url("push", f"/{event}?t={made}"))
        assert answer == (403, "the token is not one of ours"), made


@pytest.mark.parametrize("event", ["confirmed", "clicked", "dismissed"])
@pytest.mark.parametrize("channel", ["sms", "whatsapp"])
async def test_push_beacon_with_the_token_of_another_channels_message_is_refused(
    untouched: Hooks, channel: str, event: str
) -> None:
    """Whoever gets a text with a tracked link sees one, and nobody signs what a browser reports."""
    answer = await untouched.send("POST", untouched.url("push", f"/{event}?t={untouched.tokens[channel]}"))
    assert answer == (403, "the token is not one of ours")


@pytest.mark.parametrize("cut", [6, 8, 12, 16, 18])
async def test_push_beacon_with_a_token_of_two_campaigns_halves_is_refused(untouched: Hooks, cut: int) -> None:
    """One would count somebody else's message, or another campaign's."""
    push, sms = untouched.tokens["push"], untouched.tokens["sms"]
    for spliced in (push[:cut] + sms[cut:], sms[:cut] + push[cut:]):
        answer = await untouched.send("POST", untouched.url("push", f"/clicked?t={spliced}"))
        assert answer == (403, "the token is not one of ours"), spliced


async def test_push_beacon_at_the_address_of_another_app_is_refused(untouched: Hooks, rival: Rival) -> None:
    name = f"{rival.client.parent}/channelSettings/push"
    own = channels_pb2.ChannelSettings(name=name, values={"vapid_subject": "mailto:ops@rival.example"})
    await rival.client.channels.UpdateChannelSettings(channels_pb2.UpdateChannelSettingsRequest(channel_settings=own))
    try:
        for channel, token in untouched.tokens.items():
            url = f"{untouched.world.addresses.public_url}/v1/apps/rival/webhooks/push/clicked?t={token}"
            assert await untouched.send("POST", url) == (403, "the token is not one of ours"), channel
    finally:
        await rival.client.channels.DeleteChannelSettings(channels_pb2.DeleteChannelSettingsRequest(name=name))


async def test_push_beacon_with_text_that_is_no_token_is_refused(untouched: Hooks) -> None:
    for text in ("", "x", "A" * 22 + "==", "A" * 23 + "=", "A" * 25, "%00" * 24, "é" * 24, untouched.tokens["push"] + "%0a"):
        status, _ = await untouched.send("POST", untouched.url("push", f"/clicked?t={text}"))
        assert status == 403, text


async def test_push_beacon_of_no_known_kind_is_refused(untouched: Hooks) -> None:
    for kind in ("", "sent", "attempted", "failed", "clicked/x", "Clicked"):
        status, _ = await untouched.send("POST", untouched.url("push", f"/{kind}?t={untouched.tokens['push']}"))
        assert status in (400, 404), kind


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD"])
async def test_webhook_with_a_wrong_method_is_refused(untouched: Hooks, method: str) -> None:
    for channel, rest in (("sms", f"?t={untouched.tokens['sms']}"), ("whatsapp", ""), ("push", "/clicked?t=" + "A" * 24)):
        status, _ = await untouched.send(method, untouched.url(channel, rest), **untouched.sign_sms(untouched.url(channel), {}))
        assert status in (403, 405), channel


@pytest.mark.parametrize("channel", ["fax", "SMS", "sms%00", "..", "%ff"])
async def test_webhook_of_an_unknown_channel_is_refused(untouched: Hooks, channel: str) -> None:
    status, _ = await untouched.send("POST", untouched.url(channel), b"x")
    assert status == 404


@pytest.mark.parametrize("app", ["%00", "acme%00", "%ff", "Acme", "acme%20", "-acme", "a" * 64])
@pytest.mark.parametrize("path", ["/v1/apps/{}/webhooks/sms", "/v1/browsers/push/{}", "/l/{}"])
async def test_path_with_no_name_of_an_app_is_refused_without_the_database(untouched: Hooks, path: str, app: str) -> None:
    """Strangers asked it about each, and a NUL was a defect with a traceback."""
    url = f"{untouched.world.addresses.public_url}{path.format(app)}"
    async with transaction(untouched.world.core.engine) as conn:
        await conn.exec_driver_sql("LOCK TABLE apps IN ACCESS EXCLUSIVE MODE")
        status, _ = await untouched.send("GET", URL(url, encoded=True))
    assert status == 404


@pytest.mark.parametrize("channel", ["sms", "whatsapp", "push"])
async def test_webhook_above_the_limit_is_refused(untouched: Hooks, channel: str) -> None:
    body = b"x" * (4 << 20)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    for data in (io.BytesIO(body), chunks()):
        try:
            status, text = await untouched.send("POST", untouched.url(channel), data)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            # The answer may be lost when the server closes while the rest is still being sent.
            continue
        assert status == 413
        assert "larger than" in text


async def test_webhook_that_announces_more_than_the_limit_is_refused_before_it_is_read(untouched: Hooks) -> None:
    host, _, port = untouched.world.addresses.http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/webhooks/sms HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
    assert b" 413 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_webhook_that_comes_byte_by_byte_is_given_up(untouched: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "BODY_SECONDS", 0.2)
    host, _, port = untouched.world.addresses.http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/webhooks/sms HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nx")
    answer = await reader.read()
    assert b" 408 " in answer.split(b"\r\n")[0]
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("announced", ["content-length: 3000000", "transfer-encoding: chunked"])
async def test_large_webhooks_beyond_a_few_at_once_are_asked_to_come_again(untouched: Hooks, announced: str) -> None:
    """They would hold as much memory as somebody likes; small ones are taken meanwhile."""
    host, _, port = untouched.world.addresses.http.rpartition(":")
    head = f"POST /v1/webhooks/whatsapp HTTP/1.1\r\nhost: x\r\n{announced}\r\n\r\n".encode()
    async with AsyncExitStack() as stack:

        async def begin() -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection(host, int(port))
            stack.push_async_callback(writer.wait_closed)
            stack.callback(writer.close)
            writer.write(head)
            return reader

        readers = [await begin() for _ in range(ingress.MOST_LARGE_BODIES + 1)]
        lines = [asyncio.create_task(reader.readline()) for reader in readers]
        (refused,), held = await asyncio.wait(lines, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert b" 503 " in await refused
        assert len(held) == ingress.MOST_LARGE_BODIES
        assert (await untouched.send("POST", untouched.url("sms"), b"MessageStatus=x", **FORM))[0] == 403
        for line in held:
            line.cancel()
        await asyncio.gather(*held, return_exceptions=True)
    # Whoever left has made room.
    async with asyncio.timeout(60):
        while (await untouched.send("POST", untouched.url("sms"), b"x" * 100_000, **FORM))[0] != 403:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_webhook_that_is_not_utf8_is_refused(untouched: Hooks) -> None:
    assert (await untouched.send("POST", untouched.url("sms"), b"MessageStatus=\xff\xfe", **FORM))[0] == 403
    body = b'{"entry": "\xff\xfe"}'
    assert await untouched.send("POST", untouched.url("whatsapp"), body, **untouched.sign_whatsapp(body)) == (
        400,
        "the body is not JSON",
    )


async def test_webhook_signed_about_messages_of_others_is_kept_as_unrecognized_and_counts_nothing(hooks: Hooks) -> None:
    """Another system on the same provider account: refused, the provider would send it for days."""
    for token in (hooks.tokens["sms"], hooks.tokens["push"], "A" * 24, "someone else's", ""):
        before = await hooks.count_rows()
        body = write_status(token)
        status, _ = await hooks.send("POST", hooks.url("whatsapp"), body, **hooks.sign_whatsapp(body))
        after = await hooks.count_rows()
        assert (status, after[:2], after[2] - before[2]) == (200, before[:2], 1), token


async def test_webhook_signed_with_text_that_postgresql_lacks_is_kept(hooks: Hooks) -> None:
    before = await hooks.count_rows()
    body = write_status("A" * 24, id="wamid.\0")
    strange = json.dumps({"entry": [{"changes": [{"field": "\0 \ud800"}]}]}).encode()
    for data in (body, strange):
        status, _ = await hooks.send("POST", hooks.url("whatsapp"), data, **hooks.sign_whatsapp(data))
        assert status == 200
    assert (await hooks.count_rows())[2] == before[2] + 2


async def test_webhook_authentic_is_stored_before_it_is_answered(hooks: Hooks) -> None:
    before = await hooks.count_rows()
    url = hooks.url("sms", f"?t={hooks.tokens['sms']}")
    status, _ = await hooks.send("POST", url, urlencode(DELIVERED).encode(), **hooks.sign_sms(url, DELIVERED))
    body = write_status(hooks.tokens["whatsapp"])
    assert (await hooks.send("POST", hooks.url("whatsapp"), body, **hooks.sign_whatsapp(body)))[0] == 200
    beacon = await hooks.send("POST", hooks.url("push", f"/clicked?t={hooks.tokens['push']}"))
    assert (status < 300, beacon[0] < 300) == (True, True)
    after = await hooks.count_rows()
    assert (after[0] - before[0], after[2] - before[2]) == (3, 0)


# Addresses


KEYS = {
    "p256dh": "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
    "auth": "BTBZMqHH6r4Tts7J_aSIgg",
}


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://10.0.0.1/x",
        "https://169.254.169.254/latest/meta-data",
        "https://192.168.0.1/x",
        "https://[::1]/x",
        "https://[fd00::1]/x",
        "https://8.8.8.8/x",
        "https://2130706433/x",
        "https://0x7f.1/x",
        "http://fcm.googleapis.com/x",
        "https://fcm.googleapis.com:8443/x",
        "https://fcm.googleapis.com@10.0.0.1/x",
        "https://user:password@fcm.googleapis.com/x",
        "https://fcm.googleapis.com.evil.example/x",
        "https://evil.example/fcm.googleapis.com",
        "https://evil.example#.push.apple.com",
        "https://evil.example\\.push.apple.com/x",
        "https://xn--fcm-googleapis.com/x",
        "https://fcm.googleapis.com\t.evil.example/x",
        "https://fcm.googleapis.com/ x",
        "ftp://fcm.googleapis.com/x",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "//fcm.googleapis.com/x",
        "https://",
        "",
        "https://fcm.googleapis.com/" + "x" * 2048,
    ],
)
async def test_push_endpoint_inside_a_network_is_refused(shared_world: World, endpoint: str) -> None:
    await refuse_endpoint(shared_world, endpoint)


async def refuse_endpoint(world: World, endpoint: str) -> None:
    client = world.client
    good = contacts_pb2.Contact(external_id="beside-an-attacker")
    bad = contacts_pb2.Contact(external_id="attacker")
    bad.subscriptions.add(channel="push", address=to_struct({"endpoint": endpoint, "keys": KEYS}))
    request = contacts_pb2.UpsertContactsRequest(parent=client.parent, contacts=[good, bad])
    refusal = await refuse(client.contacts.UpsertContacts(request))
    assert list(refusal.fields) == ["contacts[1].subscriptions[0].address.endpoint"]
    async with transaction(world.core.engine) as conn:
        stored = await conn.execute(select(contact_ids).where(contact_ids.c.external_id.in_(["attacker", "beside-an-attacker"])))
        assert stored.all() == []
