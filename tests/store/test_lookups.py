"""Look-ups of many apps: answers are right, and memory stays within its bound, whoever asks for whom."""

from __future__ import annotations

import asyncio
import gc
import random
from datetime import UTC, datetime

import numpy as np
import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.ingest import lookups as lookups_module
from aftertouch.ingest.identities import ExternalIds, Identities, measure_table
from aftertouch.ingest.lookups import Lookups
from aftertouch.rolls.chunks import Numbers, Roll
from aftertouch.rolls.sql import write_roll
from aftertouch.store import kinds as kinds_module
from aftertouch.store.apps import create_app
from aftertouch.store.campaigns import create_campaign, update_campaign
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import OTHER, Kind, load_kinds
from aftertouch.store.tables import contact_counters, erasures

PEOPLE = 3_000
BATCH = 500
TABLE = measure_table(PEOPLE)


async def make_app(engine: AsyncEngine, name: str, people: int = PEOPLE, prefix: str = "person-") -> int:
    """An app with people of external_ids in a row."""
    async with transaction(engine) as conn:
        app = await create_app(conn, name, name)
        await conn.execute(
            text("INSERT INTO contact_ids SELECT :app_id, :prefix || n, n FROM generate_series(0, :people - 1) AS n"),
            {"app_id": app.app_id, "prefix": prefix, "people": people},
        )
        await conn.execute(insert(contact_counters).values(app_id=app.app_id, next_number=people))
    return app.app_id


async def find(lookups: Lookups, app_id: int, wanted: Numbers, people: int = PEOPLE, prefix: str = "person-") -> None:
    """Look up people by a batch at a time; those from ``people`` on are nobody."""
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        found = await lookups.find_numbers(app_id, ExternalIds.join([f"{prefix}{number}".encode() for number in part.tolist()]))
        assert found.tolist() == np.where(part < people, part, -1).tolist()


async def knows(lookups: Lookups, engine: AsyncEngine, app_id: int) -> bool:
    """True when an app's people are found though the database has none of them any more."""
    async with transaction(engine) as conn:
        await conn.execute(text("DELETE FROM contact_ids WHERE app_id = :app_id"), {"app_id": app_id})
    external_ids = ExternalIds.join([f"person-{number}".encode() for number in range(PEOPLE)])
    return bool(((await lookups.find_numbers(app_id, external_ids)) >= 0).all())


def measure_held(kind: type[Identities] | type[Roll]) -> int:
    """Bytes of all that there are of a kind in this process, whoever holds them."""
    gc.collect()
    return sum(one.nbytes for one in gc.get_objects() if isinstance(one, kind))


async def test_identities_of_many_apps_stay_within_their_bound(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each app was held against the bound alone, and ten apps took ten times as much."""
    monkeypatch.setattr(lookups_module, "IDENTITIES_PAGE", 700)
    apps = [await make_app(engine, f"app-{number}") for number in range(5)]
    most = 5 * TABLE // 2
    lookups = Lookups(engine, most_identity_bytes=most)
    for app_id in (*apps, *apps[:2]):
        await find(lookups, app_id, np.arange(PEOPLE + 100))
        assert lookups.nbytes == measure_held(Identities) <= most


async def test_identities_stay_within_their_bound_while_many_ask(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups_module, "IDENTITIES_PAGE", 700)
    apps = [await make_app(engine, f"app-{number}") for number in range(4)]
    most = 5 * TABLE // 2
    lookups = Lookups(engine, most_identity_bytes=most)
    largest = 0

    async def ask(app_id: int, seed: int) -> None:
        nonlocal largest
        for turn in range(8):
            wanted = np.random.default_rng([seed, turn]).integers(0, PEOPLE + 100, 2 * BATCH)
            await find(lookups, app_id, wanted)
            largest = max(largest, lookups.nbytes)
            await asyncio.sleep(0)

    await asyncio.gather(*(ask(app_id, seed) for seed in range(2) for app_id in apps))
    assert TABLE <= largest <= most
    assert measure_held(Identities) == lookups.nbytes


async def test_apps_in_use_stay_known_when_another_one_comes(engine: AsyncEngine) -> None:
    """One name that was not known threw out everybody's."""
    used, idle, other = [await make_app(engine, name) for name in ("used", "idle", "other")]
    lookups = Lookups(engine, most_identity_bytes=5 * TABLE // 2)
    for app_id in (used, idle, used, other):
        await find(lookups, app_id, np.arange(PEOPLE))
    assert await knows(lookups, engine, used)
    assert await knows(lookups, engine, other)
    assert not await knows(lookups, engine, idle)


async def test_app_that_is_too_large_takes_no_more_than_half(engine: AsyncEngine) -> None:
    """Its people are looked up all the same, and another app's stay known."""
    people = 4 * PEOPLE
    large, small = await make_app(engine, "large", people), await make_app(engine, "small")
    most = 5 * TABLE // 2
    lookups = Lookups(engine, most_identity_bytes=most)
    await find(lookups, small, np.arange(PEOPLE))
    wanted = np.array(random.Random(1).sample(range(people), people))
    for start in range(0, people, BATCH):
        await find(lookups, large, wanted[start : start + BATCH], people)
        assert lookups.nbytes == measure_held(Identities) <= TABLE + most // 2
    assert await knows(lookups, engine, small)


async def test_long_names_take_no_more_than_others(engine: AsyncEngine) -> None:
    """They stood in a dict that nothing bounded."""
    prefix = "a long name " * 15
    app_id = await make_app(engine, "acme", prefix=prefix)
    lookups = Lookups(engine)
    await find(lookups, app_id, np.arange(PEOPLE + 100), prefix=prefix)
    assert lookups.nbytes == measure_held(Identities) == TABLE


async def test_people_who_were_erased_meanwhile_are_not_kept(engine: AsyncEngine) -> None:
    """A look-up that began before may still bring them."""
    app_id, gone = await make_app(engine, "acme"), [3, 4, 2_000]
    async with transaction(engine) as conn:
        await conn.execute(insert(erasures), [{"app_id": app_id, "number": number} for number in gone])
    lookups = Lookups(engine)
    await find(lookups, app_id, np.arange(PEOPLE))
    async with transaction(engine) as conn:
        await conn.execute(text("DELETE FROM contact_ids"))
    external_ids = ExternalIds.join([f"person-{number}".encode() for number in range(PEOPLE)])
    found = await lookups.find_numbers(app_id, external_ids)
    assert np.flatnonzero(found < 0).tolist() == gone


async def make_campaign(engine: AsyncEngine, app_id: int, name: str, numbers: Numbers) -> int:
    async with transaction(engine) as conn:
        audience = {"given_contacts": {"contacts": ["apps/acme/contacts/ada"] * 1_000}}
        made = await create_campaign(conn, app_id, name, {"display_name": name, "channel": "sms", "audience": audience})
        await write_roll(conn, made.campaign_id, numbers)
        await update_campaign(conn, made.campaign_id, recipients=len(numbers), launch_time=datetime.now(UTC))
    return made.campaign_id


async def test_rolls_stay_within_their_bound(engine: AsyncEngine) -> None:
    """Small ones were weighed by their people alone: a million rolls of nobody weighed nothing."""
    app_id = await make_app(engine, "acme", 0)
    rolls = [np.arange(size) * step for size in (0, 1, 300, 1_000) for step in (1, 3, 100)]
    campaigns = [await make_campaign(engine, app_id, f"sale-{at}", numbers) for at, numbers in enumerate(rolls)]
    most = 30_000
    lookups = Lookups(engine, most_roll_bytes=most)
    held = []
    for at in np.random.default_rng(1).integers(0, len(rolls), 60).tolist():
        roll = await lookups.read_roll(campaigns[at])
        assert roll.find(rolls[at]).tolist() == list(range(len(rolls[at])))
        del roll
        held.append(measure_held(Roll))
        assert held[-1] == lookups.nbytes
    assert most // 2 < max(held) <= most


async def test_roll_that_many_ask_for_is_read_once(engine: AsyncEngine) -> None:
    """A hundred streams of one campaign that began at once held a hundred copies while they read."""
    app_id = await make_app(engine, "acme", 0)
    campaign_id = await make_campaign(engine, app_id, "sale", np.arange(1_000))
    lookups = Lookups(engine)
    rolls = await asyncio.gather(*(lookups.read_roll(campaign_id) for _ in range(20)))
    assert all(roll is rolls[0] for roll in rolls)


async def test_made_up_reasons_are_numbered_up_to_a_bound(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch was held against the bound alone, and a new process began anew; a refused try could be lost among them."""
    for module in (kinds_module, lookups_module):
        monkeypatch.setattr(module, "MOST_KINDS", 20)
    for _ in range(2):
        made_up = [[Kind("failed", "unknown", f"{number}-{at}") for at in range(15)] for number in range(4)]
        tries = [Kind("refused", "transient", str(number)) for number in range(30)]
        lookups = [Lookups(engine) for _ in made_up]
        await asyncio.gather(*(one.number_kinds(kinds) for one, kinds in zip(lookups, made_up, strict=True)))
        for one, kinds in zip(lookups, made_up, strict=True):
            numbers = await one.number_kinds([*kinds, *tries])
            assert numbers.keys() == {*kinds, *tries}
            async with transaction(engine) as conn:
                stored = await load_kinds(conn)
            assert {kind: stored[number] for kind, number in numbers.items() if kind in tries} == {kind: kind for kind in tries}
            assert {stored[numbers[kind]] for kind in kinds} <= {*kinds, Kind("failed", "unknown", OTHER)}
    assert sum(kind.signal == "failed" for kind in stored.values()) == 20 + 1


async def test_campaign_is_kept_without_its_audience(engine: AsyncEngine) -> None:
    """Ten thousand campaigns to 10,000 given contacts each would have been gigabytes."""
    app_id = await make_app(engine, "acme", 0)
    campaign_id = await make_campaign(engine, app_id, "sale", np.arange(3))
    lookups = Lookups(engine)
    await lookups.read_launched([campaign_id])
    for found in (
        (await lookups.read_launched([campaign_id]))[campaign_id],
        (await lookups.find_launched(app_id, ["sale"]))["sale"],
    ):
        assert (found.recipients, found.content, found.audience) == (3, None, None)
