"""Who matches: the actions of a campaign and whole selections, answered in bits.

A question is answered by position, over its campaign's receipts, and then carried over to contact numbers by the roll; from
there everything, combinations and what a channel reaches, is one more ``&`` or ``|``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import UNCLEAR, ChannelType, CompiledAction
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.selections import Combination, Question, Selection, Source, Sources, list_questions
from aftertouch.rolls.chunks import CHUNK_BYTES, Bits, count_bits, count_chunks, gather, spread
from aftertouch.rolls.sql import read_sets
from aftertouch.signals import CORE_IMPLICATIONS, Expression, parse
from aftertouch.store.contacts import count_contacts, standing_set
from aftertouch.store.kinds import Kind, load_kinds

STRETCH_BYTES = 64 * CHUNK_BYTES
"""Dozens of sets of half a million people fit into a core's cache together, where those of ten million come from memory for
every operator: all of WhatsApp's actions take 5 ms so, not 12. From 128 KiB on malloc maps pages anew for every result."""


@dataclass(frozen=True)
class ActionCount:
    """How many people match an action, and how sure that is."""

    action: str
    count: int
    apart_count: int
    """Not in ``count``: of them the answer cannot be known (yet)."""
    pending_count: int
    """In ``count``: of them nothing was heard since their message was sent."""
    reachable: Mapping[str, int]
    """Of ``count``, who has an active subscription on each channel that was asked for."""


@dataclass(frozen=True)
class Matrix:
    """Every action of a campaign's channel, counted."""

    actions: list[ActionCount]
    pending: int
    unclear: int


def find_pending(channel: ChannelType) -> Expression:
    """Whose message was sent, and of whom nothing was heard since: no failure, and none of the channel's own signals."""
    heard = ["failed", *(signal for signal in channel.evidence if signal not in CORE_IMPLICATIONS)]
    return parse(f"sent & ~({' | '.join(heard)})", channel.evidence)


def leave_out(expression: Expression, others: Expression | None) -> Expression:
    """Of whom the one is true and not the other."""
    return expression if others is None else Expression("&", (expression, Expression("~", (others,))))


def _express(compiled: CompiledAction, channel: ChannelType, question: Question) -> Expression:
    expression = compiled.expression
    if question.include_apart and compiled.apart is not None:
        expression = Expression("|", (expression, compiled.apart))
    else:
        expression = leave_out(expression, compiled.apart)
    return leave_out(expression, find_pending(channel)) if question.leave_out_pending else expression


class Known:
    """What is known of a campaign's people, each kind as bits of ``length`` bytes by position."""

    def __init__(self, channel: ChannelType, numbered: Mapping[int, Kind], bits: Mapping[int, Bits], length: int) -> None:
        self._channel = channel
        self._numbered = numbered
        self._bits = bits
        self._length = length
        self._signals: dict[str, Bits] = {}

    def _join(self, is_meant: Callable[[Kind], bool]) -> Bits:
        chosen = [bits for number, bits in self._bits.items() if is_meant(self._numbered[number])]
        return reduce(np.bitwise_or, chosen) if chosen else np.zeros(self._length, np.uint8)

    def _find(self, signal: str) -> Bits:
        if signal not in self._signals:
            self._signals[signal] = self._join(lambda kind: kind.signal in self._channel.evidence[signal])
        return self._signals[signal]

    def cut(self) -> Iterator[tuple[slice, Known]]:
        """Stretches of positions, one after the other, each with what is known of its people."""
        for start in range(0, self._length, STRETCH_BYTES):
            stretch = slice(start, min(start + STRETCH_BYTES, self._length))
            bits = {number: found[stretch] for number, found in self._bits.items()}
            yield stretch, Known(self._channel, self._numbered, bits, stretch.stop - start)

    def evaluate(self, expression: Expression) -> Bits:
        """Of whom the expression is true."""
        true: Bits = expression.evaluate(self._find)
        return true

    def answer(self, question: Question) -> Bits:
        """Who matches a question, which was checked."""
        matching = self.evaluate(_express(self._channel.actions[question.action], self._channel, question))
        if question.reason_codes or question.reason_classes:
            codes, classes = frozenset(question.reason_codes), frozenset(question.reason_classes)
            reasoned = self._channel.actions[question.action].reasoned
            return matching & self._join(
                lambda kind: kind.signal == reasoned and (kind.reason_code in codes or kind.reason_class in classes)
            )
        return matching


async def _read_known(
    conn: AsyncConnection, copies: Copies, source: Source, numbered: Mapping[int, Kind], signals: Collection[str]
) -> Known:
    proving = frozenset[str]().union(*(source.channel.evidence[signal] for signal in signals))
    kinds = [number for number, kind in numbered.items() if kind.signal in proving]
    bits = await copies.read_receipts(conn, source.campaign, kinds)
    return Known(source.channel, numbered, bits, count_chunks(source.campaign.recipients) * CHUNK_BYTES)


async def count_blocks(conn: AsyncConnection, app_id: int) -> int:
    """How many blocks of contact numbers an app has."""
    return count_chunks(await count_contacts(conn, app_id))


async def match(conn: AsyncConnection, copies: Copies, sources: Sources, selection: Selection, blocks: int) -> Bits:
    """The people of a selection, as bits by contact number.

    Args:
        blocks: how many blocks the bits span; all of the app's.
    """
    numbered = await load_kinds(conn)
    signals: dict[str, set[str]] = {name: {"failed"} for name in sources}
    for question, _ in list_questions(selection):
        channel = sources[question.source].channel
        signals[question.source] |= _express(channel.actions[question.action], channel, question).names
    known = {name: await _read_known(conn, copies, source, numbered, signals[name]) for name, source in sources.items()}

    async def combine(part: Selection) -> Bits:
        names = {question.source for question, _ in list_questions(part)}
        if len(names) == 1:
            # What is asked of one campaign is combined by position, and carried over once. Of twenty large campaigns memory has
            # room for the bits, and for a roll or two.
            (name,) = names
            roll = await copies.read_roll(conn, sources[name].campaign)
            return await asyncio.to_thread(lambda: spread(answer_selection(part, known), roll, blocks))
        assert isinstance(part, Combination)
        operands = [await combine(operand) for operand in part.operands]
        return await asyncio.to_thread(_fold, part.operator, operands)

    return await combine(selection)


def answer_selection(selection: Selection, known: Mapping[str, Known]) -> Bits:
    """Who matches, from what is known of the people of each source; all of it by the same positions."""
    if isinstance(selection, Question):
        return known[selection.source].answer(selection)
    return _fold(selection.operator, [answer_selection(operand, known) for operand in selection.operands])


def _fold(operator: str, operands: Sequence[Bits]) -> Bits:
    match operator:
        case "any_of":
            return reduce(np.bitwise_or, operands)
        case "all_of":
            return reduce(np.bitwise_and, operands)
        case _:
            everybody, excluded = operands
            return everybody & ~excluded


async def count_matrix(conn: AsyncConnection, copies: Copies, source: Source, channels: Sequence[str] = ()) -> Matrix:
    """Every action of the campaign's channel with its exact counts, and how many of those who match each channel reaches."""
    actions = source.channel.actions
    pending = find_pending(source.channel)
    asked = [part for compiled in actions.values() for part in (compiled.expression, compiled.apart) if part is not None]
    signals = frozenset[str]().union(*(expression.names for expression in (pending, *asked)))
    known = await _read_known(conn, copies, source, await load_kinds(conn), signals)
    roll, sets = np.empty(0, np.int64), dict[str, Bits]()
    if channels:
        roll = await copies.read_roll(conn, source.campaign)
        blocks = await count_blocks(conn, source.campaign.app_id)
        sets = await read_sets(conn, source.campaign.app_id, [standing_set("active", channel) for channel in channels], blocks)

    # numpy lets other threads run meanwhile, so each core takes a channel.
    gathered = await asyncio.gather(*(asyncio.to_thread(gather, bits, roll) for bits in sets.values()))
    active = dict(zip(channels, gathered, strict=True))

    meant = [(leave_out(compiled.expression, compiled.apart), compiled.apart) for compiled in actions.values()]

    def count_stretch(stretch: slice, people: Known) -> list[int]:
        are_pending = people.evaluate(pending)
        still_out = count_bits(are_pending)
        counts = [still_out]
        for expression, apart in meant:
            matching = people.evaluate(expression)
            counts += [count_bits(matching), count_bits(people.evaluate(apart)) if apart is not None else 0]
            # Of a campaign that has settled nobody is pending in most stretches, which spares a set and a count for each action.
            counts.append(count_bits(matching & are_pending) if still_out else 0)
            counts += [count_bits(matching & bits[stretch]) for bits in active.values()]
        return counts

    def count() -> Matrix:
        counted = np.array([count_stretch(*part) for part in known.cut()]).reshape(-1, 1 + len(meant) * (3 + len(active)))
        sums = counted.sum(axis=0)
        rows = {
            name: ActionCount(name, count, apart, still_out, dict(zip(active, reached, strict=True)))
            for name, (count, apart, still_out, *reached) in zip(actions, sums[1:].reshape(len(meant), -1).tolist(), strict=True)
        }
        return Matrix(list(rows.values()), int(sums[0]), rows[UNCLEAR.name].count)

    return await asyncio.to_thread(count)
