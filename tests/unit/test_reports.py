"""Reading a batch from its bytes: for no bytes whatever may it come to another result than protobuf does."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aftertouch.ingest.reports import Reports
from aftertouch.rpc.reports import MOST_EVENTS, read_batch, read_reports
from aftertouch.v1 import events_pb2

APP = "apps/acme"
NOW = 1_790_000_000

tokens = st.binary(min_size=18, max_size=18).map(lambda data: base64.urlsafe_b64encode(data).decode())
signals = st.sampled_from(["sent", "delivered", "read", "failed", "rent", "seed", "zustellbar-ü"])
times = st.builds(
    lambda seconds, nanos: (seconds, nanos), st.integers(NOW - 10**8, NOW + 10**8), st.sampled_from([0, 1, 999_999_999])
)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
odd_texts = st.text(max_size=8) | st.builds(
    lambda text, times: text * times, st.text(min_size=1, max_size=2), st.integers(20, 140)
)


@st.composite
def regular_events(draw: st.DrawFn) -> list[events_pb2.Event]:
    """Events as a client's library sends them: one way of naming people, signals mixed, times with and without fractions."""
    campaign = draw(st.sampled_from([f"{APP}/campaigns/sale", "apps/other/campaigns/sale", "sale"]))
    by_token = draw(st.booleans())
    events = []
    for _ in range(draw(st.integers(1, 12))):
        event = events_pb2.Event(signal=draw(signals))
        if by_token:
            event.token = draw(tokens)
        else:
            event.recipient.campaign = campaign
            event.recipient.external_id = draw(names)
        event.time.seconds, event.time.nanos = draw(times)
        events.append(event)
    return events


@st.composite
def any_events(draw: st.DrawFn) -> list[events_pb2.Event]:
    """Events of all kinds in one batch, the strange ones among them."""
    events = []
    for _ in range(draw(st.integers(0, 4))):
        event = events_pb2.Event(signal=draw(signals | odd_texts), reason_code=draw(st.sampled_from(["", "30005"])))
        match draw(st.integers(0, 3)):
            case 0:
                event.token = draw(tokens | odd_texts | st.text(min_size=24, max_size=24))
            case 1:
                event.recipient.campaign = draw(st.sampled_from(["", f"{APP}/campaigns/sale", f"{APP}/campaigns/", "x" * 130]))
                event.recipient.external_id = draw(odd_texts)
            case 2:
                event.message.channel, event.message.message_id = "sms", draw(odd_texts)
        if draw(st.booleans()):
            event.time.seconds = draw(st.integers(-(2**63), 2**63 - 1) | st.integers(NOW, NOW + 9))
            event.time.nanos = draw(st.integers(-(2**31), 2**31 - 1))
        events.append(event)
    return events


def encode(position: int, events: list[events_pb2.Event]) -> bytes:
    batch = events_pb2.EventsBatch(position=position, events=events)
    return events_pb2.StreamEventsRequest(batch=batch).SerializeToString()


def normalize(reports: Reports) -> list[tuple[Any, ...]]:
    """What each report says, however its columns are cut."""
    targets: dict[int, tuple[Any, ...]] = {}
    if reports.by_token is not None:
        for place, index in enumerate(reports.by_token.indexes.tolist()):
            token = reports.by_token.tokens[24 * place : 24 * place + 24]
            targets[index] = ("token", token)
        assert len(reports.by_token.tokens) == 24 * len(reports.by_token.indexes)
    if (named := reports.by_name) is not None:
        for index, campaign, external_id in zip(named.indexes, named.campaign_of, named.external_ids, strict=True):
            targets[int(index)] = ("name", named.campaigns[campaign], external_id)
    if (sent := reports.by_message) is not None:
        for index, channel, message_id in zip(sent.indexes, sent.channels, sent.message_ids, strict=True):
            targets[int(index)] = ("message", channel, message_id)
    for index in reports.malformed.tolist() if reports.malformed is not None else ():
        assert index not in targets
        targets[index] = ("malformed",)
    labels = [reports.labels[label] for label in reports.label_of.tolist()]
    return [(targets[index], labels[index], time) for index, time in enumerate(reports.times.tolist())]


def check_agreement(data: bytes) -> None:
    """Whatever the bytes: either they are left to protobuf, or they say what protobuf says."""
    found = read_batch(APP, data)
    if found is None:
        return
    parsed = events_pb2.StreamEventsRequest.FromString(data)
    assert parsed.WhichOneof("kind") == "batch"
    assert len(parsed.batch.events) <= MOST_EVENTS
    assert found[0] == parsed.batch.position
    assert normalize(found[1]) == normalize(read_reports(APP, parsed.batch.events))


@given(st.integers(1, 2**62), regular_events())
def test_regular_batch_reads_as_protobuf_does(position: int, events: list[events_pb2.Event]) -> None:
    found = read_batch(APP, encode(position, events))
    if all(event.ByteSize() < 128 for event in events):
        assert found is not None
        assert found[0] == position
        assert normalize(found[1]) == normalize(read_reports(APP, events))
    else:
        assert found is None


@given(st.integers(-(2**63), 2**63 - 1), any_events() | regular_events())
@settings(max_examples=400)
def test_batch_of_any_events_is_read_as_protobuf_does_or_left_to_it(position: int, events: list[events_pb2.Event]) -> None:
    check_agreement(encode(position, events))


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x12")
@example(b"\x12\x00")
@example(b"\x12\x01\x08")
@example(b"\x12\x02\x08\x01")
@example(b"\x12\x04\x08\x01\x12\x00")
@example(b"\x12" + b"\xff" * 12)
@settings(max_examples=400)
def test_any_bytes_are_read_as_protobuf_does_or_left_to_it(data: bytes) -> None:
    check_agreement(data)
    # As far as the outer frame goes they are a batch.
    body = b"\x08\x01" + data
    check_agreement(b"\x12" + encode_varint(len(body)) + body)


@given(regular_events(), st.data())
@settings(max_examples=1_500)
def test_damaged_batch_is_read_as_protobuf_does_or_left_to_it(events: list[events_pb2.Event], data: st.DataObject) -> None:
    wire = bytearray(encode(1, events))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(wire) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                wire[at] = data.draw(st.integers(0, 255))
            case 1:
                del wire[at]
            case 2:
                wire.insert(at, data.draw(st.integers(0, 255)))
        if not wire:
            break
    check_agreement(bytes(wire))


@given(regular_events(), st.permutations(range(3)), st.booleans(), st.binary(max_size=8))
@settings(max_examples=300)
def test_fields_in_another_order_or_twice_are_read_as_protobuf_does(
    events: list[events_pb2.Event], order: list[int], is_doubled: bool, unknown: bytes
) -> None:
    body = b"\x08\x01"
    for event in events:
        parts = [
            events_pb2.Event(token=event.token, recipient=None).SerializeToString()
            if event.token
            else events_pb2.Event(recipient=event.recipient).SerializeToString(),
            events_pb2.Event(signal=event.signal).SerializeToString(),
            events_pb2.Event(time=event.time).SerializeToString(),
        ]
        inner = b"".join(parts[place] for place in order) + (parts[order[0]] if is_doubled else b"")
        if unknown:
            inner += b"\x7a" + encode_varint(len(unknown)) + unknown
        body += b"\x12" + encode_varint(len(inner)) + inner
    wire = b"\x12" + encode_varint(len(body)) + body
    check_agreement(wire)
    check_agreement(wire + wire)
    check_agreement(wire + events_pb2.StreamEventsRequest(open=events_pb2.OpenStream(parent=APP)).SerializeToString())


@pytest.mark.parametrize("nanos", [0, 127, 128, 999_999_999, 2**31 - 1, 2**31, 2**32 - 1, 2**35 - 1])
def test_number_of_nanos_beyond_its_type_is_read_as_protobuf_does(nanos: int) -> None:
    token = events_pb2.Event(token="A" * 24, signal="sent").SerializeToString()
    stamp = b"\x08" + encode_varint(NOW) + b"\x10" + encode_varint(nanos)
    inner = token + b"\x2a" + encode_varint(len(stamp)) + stamp
    body = b"\x08\x01\x12" + encode_varint(len(inner)) + inner
    check_agreement(b"\x12" + encode_varint(len(body)) + body)


@pytest.mark.parametrize("position", [0, 1, 127, 128, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**69])
def test_position_beyond_its_type_is_read_as_protobuf_does(position: int) -> None:
    event = events_pb2.Event(token="A" * 24, signal="sent")
    event.time.seconds = NOW
    inner = event.SerializeToString()
    body = b"\x08" + encode_varint(position) + b"\x12" + encode_varint(len(inner)) + inner
    check_agreement(b"\x12" + encode_varint(len(body)) + body)


@pytest.mark.parametrize(
    "event",
    [
        events_pb2.Event(token="A" * 24, signal="sent"),
        events_pb2.Event(
            recipient=events_pb2.RecipientTarget(campaign=f"{APP}/campaigns/sale", external_id="aaaa"), signal="sent"
        ),
    ],
    ids=["token", "external_id"],
)
def test_text_that_is_not_utf8_is_left_to_protobuf(event: events_pb2.Event) -> None:
    event.time.seconds = NOW
    wire = encode(1, [event]).replace(b"aaaa", b"aa\xc3a").replace(b"A" * 24, b"A" * 23 + b"\xff")
    with pytest.raises(DecodeError):
        events_pb2.StreamEventsRequest.FromString(wire)
    assert read_batch(APP, wire) is None


def test_bytes_that_make_a_character_across_two_people_are_left_to_protobuf() -> None:
    """The last byte of one external_id and the first of the next would be a character if they were put together."""
    people = [events_pb2.RecipientTarget(campaign=f"{APP}/campaigns/sale", external_id=name) for name in ("aaaa", "bbbb")]
    events = [events_pb2.Event(recipient=person, signal="sent") for person in people]
    for event in events:
        event.time.seconds = NOW
    wire = encode(1, events).replace(b"aaaa", b"aaa\xc3").replace(b"bbbb", b"\xbcbbb")
    assert read_batch(APP, wire) is None


def test_batch_of_too_many_events_is_left_to_protobuf() -> None:
    event = events_pb2.Event(token="A" * 24, signal="sent")
    event.time.seconds = NOW
    assert read_batch(APP, encode(1, [event] * MOST_EVENTS)) is not None
    assert read_batch(APP, encode(1, [event] * (MOST_EVENTS + 1))) is None


@pytest.mark.parametrize("seconds", [2**63 - 1, -(2**63), 18_446_744_073_709, 2**64 // 10**6 + NOW])
def test_time_too_large_for_microseconds_is_far_away_and_never_now(seconds: int) -> None:
    event = events_pb2.Event(token="A" * 24, signal="sent")
    event.time.seconds = seconds
    ((_, _, time),) = normalize(read_reports(APP, [event]))
    assert abs(time) > 10**9 * 10**6


def encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
