"""Secrets of apps: made once, sealed, and readable under the key that they were made with."""

from __future__ import annotations

import asyncio

import pytest
from aftertouch_push import PushChannel
from aftertouch_sms import SmsChannel
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.store.app_secrets import create_identity_secret, ensure_app_keys, read_identity_secrets
from aftertouch.store.apps import create_app
from aftertouch.store.engine import transaction
from aftertouch.vault import Vault

VAULT, OTHER = Vault(b"the key"), Vault(b"another key")


@pytest.fixture
async def app_id(engine: AsyncEngine) -> int:
    async with transaction(engine) as conn:
        return (await create_app(conn, "acme", "Acme")).app_id


async def test_keys_are_made_once_however_many_ask(engine: AsyncEngine, app_id: int) -> None:
    async def ask() -> str:
        async with transaction(engine) as conn:
            return (await ensure_app_keys(conn, VAULT, app_id, PushChannel))["vapid_private_key"]

    assert len(set(await asyncio.gather(*(ask() for _ in range(8))))) == 1


async def test_channel_without_keys_has_none(engine: AsyncEngine, app_id: int) -> None:
    async with transaction(engine) as conn:
        assert await ensure_app_keys(conn, VAULT, app_id, SmsChannel) == {}


async def test_two_newest_identity_secrets_are_valid(engine: AsyncEngine, app_id: int) -> None:
    async with transaction(engine) as conn:
        made = [await create_identity_secret(conn, VAULT, app_id) for _ in range(3)]
        assert await read_identity_secrets(conn, VAULT, app_id) == [made[2], made[1]]


async def test_other_secret_key_leads_to_new_keys_and_back(engine: AsyncEngine, app_id: int) -> None:
    async with transaction(engine) as conn:
        secret = await create_identity_secret(conn, VAULT, app_id)
        first = await ensure_app_keys(conn, VAULT, app_id, PushChannel)
        second = await ensure_app_keys(conn, OTHER, app_id, PushChannel)
        assert second != first
        assert await read_identity_secrets(conn, OTHER, app_id) == []
        assert await ensure_app_keys(conn, VAULT, app_id, PushChannel) == first
        assert await read_identity_secrets(conn, VAULT, app_id) == [secret]
