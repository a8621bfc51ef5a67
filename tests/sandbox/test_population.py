import csv
from collections import Counter
from pathlib import Path

import phonenumbers

from aftertouch.sandbox import Population, Shares

URL = "http://127.0.0.1:9"


def make_population(seed: int = 1, size: int = 2000) -> Population:
    return Population(seed, size, URL, Shares())


def test_population_is_the_same_for_the_same_seed() -> None:
    assert list(make_population()) == list(make_population())
    assert list(make_population()) != list(make_population(seed=2))


def test_population_has_valid_and_distinct_mobile_numbers() -> None:
    people = list(make_population())
    for person in people:
        number = phonenumbers.parse(person.phone)
        assert phonenumbers.is_valid_number(number)
        assert phonenumbers.number_type(number) == phonenumbers.PhoneNumberType.MOBILE
    assert len({person.phone for person in people}) == len(people)


def test_population_is_found_by_phone_and_by_endpoint() -> None:
    population = make_population()
    for person in population:
        assert population.find_phone(person.phone) == person
        found = population.find_browser(population.get_endpoint(person.index).rpartition("/")[2])
        assert found == (person if "push" in person.channels else None)
    assert population.find_phone("+14155550123") is None
    assert population.find_browser("x" * 24) is None
    assert population.find_browser("é" * 24) is None


def test_population_shares_are_about_as_asked() -> None:
    people = list(make_population())
    sizes = Counter(len(person.channels) for person in people)
    assert 0.3 < sizes[3] / len(people) < 0.4
    assert 0.25 < sizes[2] / len(people) < 0.35
    assert 0.005 < sum(not person.first_name for person in people) / len(people) < 0.04


def test_csv_has_empty_cells_where_a_channel_is_missing(tmp_path: Path) -> None:
    population = make_population(size=200)
    path = tmp_path / "contacts.csv"
    population.write_csv(path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    for person, row in zip(population, rows, strict=True):
        assert row["external_id"] == person.external_id == f"user-{person.index:06d}"
        assert row["first_name"] == person.first_name
        assert bool(row["sms.phone"]) == ("sms" in person.channels)
        assert bool(row["whatsapp.phone"]) == ("whatsapp" in person.channels)
        if "push" in person.channels:
            assert row["push.endpoint"].startswith(f"{URL}/push/")
            assert (len(row["push.keys.p256dh"]), len(row["push.keys.auth"])) == (87, 22)
            assert row["push.confirms"] == ("true" if person.push_confirms else "false")
        else:
            assert {row[f"push.{name}"] for name in ("endpoint", "keys.p256dh", "keys.auth", "confirms")} == {""}
