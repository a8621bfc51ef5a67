"""The Apps service: the caller's app, and keys that are made once, shown once and revoked at once."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

import pytest

from aftertouch.rpc.pages import make_page_token
from aftertouch.v1 import apps_pb2, options_pb2
from tests.fix_world import World
from tests.refusals import refuse


async def create_key(world: World, *scopes: Any, display_name: str = "checkout") -> apps_pb2.ApiKey:
    key = apps_pb2.ApiKey(display_name=display_name, scopes=scopes or [options_pb2.SCOPE_READ])
    return await world.client.apps.CreateApiKey(apps_pb2.CreateApiKeyRequest(parent=world.client.parent, api_key=key))


async def list_keys(world: World, page_size: int = 1000) -> list[apps_pb2.ApiKey]:
    keys: list[apps_pb2.ApiKey] = []
    token = ""
    while True:
        request = apps_pb2.ListApiKeysRequest(parent="apps/acme", page_size=page_size, page_token=token)
        page = await world.client.apps.ListApiKeys(request)
        keys += page.api_keys
        token = page.next_page_token
        if not token:
            return keys


async def test_app_is_told_with_its_plan(shared_world: World) -> None:
    app = await shared_world.client.apps.GetApp(apps_pb2.GetAppRequest(name="apps/acme"))
    assert (app.name, app.display_name, app.retargeting_enabled, app.retention_days) == ("apps/acme", "Acme", True, 30)
    assert app.retargetable_since == app.create_time


@pytest.mark.parametrize("name", ["", "acme", "campaigns/acme", "apps"])
async def test_app_of_another_form_is_a_field_error(shared_world: World, name: str) -> None:
    assert list((await refuse(shared_world.client.apps.GetApp(apps_pb2.GetAppRequest(name=name)))).fields) == ["name"]


async def test_key_works_and_its_secret_is_shown_once(shared_world: World) -> None:
    made = await create_key(shared_world, options_pb2.SCOPE_READ, options_pb2.SCOPE_INGEST)
    assert made.secret.startswith(f"at_{made.name.rpartition('/')[2]}_")
    async with shared_world.connect("acme", made.secret) as client:
        assert (await client.apps.GetApp(apps_pb2.GetAppRequest(name="apps/acme"))).name == "apps/acme"
    listed = next(key for key in await list_keys(shared_world) if key.name == made.name)
    made.ClearField("secret")
    assert listed == made
    assert set(made.scopes) == {options_pb2.SCOPE_READ, options_pb2.SCOPE_INGEST}


@pytest.mark.parametrize(
    ("key", "field"),
    [
        (apps_pb2.ApiKey(scopes=[1]), "api_key.display_name"),
        (apps_pb2.ApiKey(display_name="x" * 201, scopes=[1]), "api_key.display_name"),
        (apps_pb2.ApiKey(display_name="x"), "api_key.scopes"),
        (apps_pb2.ApiKey(display_name="x", scopes=[1, 1]), "api_key.scopes"),
        (apps_pb2.ApiKey(display_name="x", scopes=[0]), "api_key.scopes[0]"),
        (apps_pb2.ApiKey(display_name="x", scopes=[1, 99]), "api_key.scopes[1]"),
        (None, "api_key"),
    ],
)
async def test_key_without_a_purpose_or_scope_is_refused(shared_world: World, key: Any, field: str) -> None:
    request = apps_pb2.CreateApiKeyRequest(parent="apps/acme", api_key=key)
    assert list((await refuse(shared_world.client.apps.CreateApiKey(request))).fields) == [field]


async def test_keys_are_listed_oldest_first_to_the_end(shared_world: World) -> None:
    made = [(await create_key(shared_world, display_name=f"n{i}")).name for i in range(6)]
    everything = [key.name for key in await list_keys(shared_world)]
    assert everything[-6:] == made
    for size in (1, 2, 5):
        assert [key.name for key in await list_keys(shared_world, size)] == everything


async def test_revoked_key_stays_listed_and_revoking_again_changes_nothing(shared_world: World) -> None:
    made = await create_key(shared_world)
    request = apps_pb2.DeleteApiKeyRequest(name=made.name)
    async with shared_world.connect("acme", made.secret) as client:
        await client.apps.GetApp(apps_pb2.GetAppRequest(name="apps/acme"))
        await shared_world.client.apps.DeleteApiKey(request)
        assert (await refuse(client.apps.GetApp(apps_pb2.GetAppRequest(name="apps/acme")))).reason == "API_KEY_INVALID"
    before = next(key for key in await list_keys(shared_world) if key.name == made.name)
    await shared_world.client.apps.DeleteApiKey(request)
    assert before.HasField("revoke_time")
    assert next(key for key in await list_keys(shared_world) if key.name == made.name) == before


async def test_key_that_does_not_exist_cannot_be_revoked(shared_world: World) -> None:
    request = apps_pb2.DeleteApiKeyRequest(name="apps/acme/apiKeys/0123456789ab")
    assert (await refuse(shared_world.client.apps.DeleteApiKey(request))).reason == "RESOURCE_NOT_FOUND"


def forge(*position: Any) -> str:
    """A token with the right digest: whoever reads the source can make one."""
    digest = json.loads(urlsafe_b64decode(make_page_token("apps/acme/apiKeys", "")))[0]
    return urlsafe_b64encode(json.dumps([digest, *position]).encode()).decode()


@pytest.mark.parametrize(
    "token",
    [
        *("x", "é", "AAAA", "W10=", "e30=", "MQ==", urlsafe_b64encode(b"[" * 20_000).decode()),
        *(forge(), forge(1), forge(None), forge("a", "b"), forge("\0"), forge("\ud800")),
    ],
)
async def test_page_token_that_was_made_up_is_refused(shared_world: World, token: str) -> None:
    request = apps_pb2.ListApiKeysRequest(parent="apps/acme", page_token=token)
    assert list((await refuse(shared_world.client.apps.ListApiKeys(request))).fields) == ["page_token"]
