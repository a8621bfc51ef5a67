"""What a channel's outcomes mean: for the person, for their addresses, and for whether and when they are tried again. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from aftertouch.channels import Accepted, Channel, Outcome, ReasonClass, Refused, Unclear
from aftertouch.declarations import ChannelType
from aftertouch.delivery.drafts import Draft
from aftertouch.signals import PRICED
from aftertouch.store.kinds import Kind

MOST_TRIES = 10
"""Refusals with back-off that add up to about five minutes; then a person has failed, with the last reason."""
MOST_UNKNOWN_TRIES = 3
"""The same for a code that nobody knows: it is more likely to be final."""
MOST_TRIES_IN_TROUBLE = 100
"""The same while nobody else gets through either: that is the provider's trouble and not the person's."""
_STATES = {ReasonClass.RECIPIENT_GONE: "invalid", ReasonClass.OPTED_OUT: "opted_out"}


@dataclass(frozen=True)
class Verdict:
    """What became of a person."""

    kinds: tuple[Kind, ...] = ()
    """What is true of them now; empty when it is unclear."""
    refusal: Refused | None = None
    """Why they will be tried again."""
    reason_class: ReasonClass | None = None
    """Of the refusal, whether it is final or not."""


_KIND_SENT = Kind("sent")
_SENT = Verdict((_KIND_SENT,))
"""What nearly everybody's is."""


def judge(channel_type: ChannelType, outcomes: Sequence[Outcome], tries: int, *, in_trouble: bool) -> Verdict:
    """What became of a person, from the outcomes of each of their addresses: one that was reached is enough."""
    if len(outcomes) == 1 and isinstance(outcomes[0], Accepted) and not outcomes[0].signals and outcomes[0].price is None:
        return _SENT
    accepted = [outcome for outcome in outcomes if isinstance(outcome, Accepted)]
    if accepted:
        extra = frozenset.intersection(*(frozenset(outcome.signals) for outcome in accepted))
        declared = (Kind(signal) for signal in sorted(extra & channel_type.evidence.keys()))
        return Verdict((_KIND_SENT, *declared, *list_prices(accepted)))
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    if len(refused) < len(outcomes):
        return Verdict()
    classified = [(channel_type.channel.classify(outcome.code), outcome) for outcome in refused]
    for reason_class, outcome in classified:
        if may_try_again(reason_class, tries, in_trouble=in_trouble):
            return Verdict((Kind("refused", reason_class, str(tries)),), outcome, reason_class)
    reason_class, outcome = classified[0]
    return Verdict((Kind("failed", reason_class, outcome.code[:64]),), None, reason_class)


def list_prices(accepted: Iterable[Accepted]) -> list[Kind]:
    """What a person's messages cost, one kind for each currency: of two that cost the same, bits would keep one."""
    amounts: dict[str, Decimal] = defaultdict(Decimal)
    for outcome in accepted:
        if outcome.price is not None:
            amounts[outcome.price.currency] += outcome.price.amount
    return [Kind(PRICED, currency, f"{round(amount, 6).normalize():f}") for currency, amount in sorted(amounts.items())]


def may_try_again(reason_class: ReasonClass, tries: int, *, in_trouble: bool) -> bool:
    """True when somebody who was refused for this, now for the ``tries``-th time, is still to be sent to."""
    match reason_class:
        case ReasonClass.CONFIG | ReasonClass.RATE:
            return True
        case ReasonClass.UNKNOWN:
            return tries < MOST_UNKNOWN_TRIES
        case _:
            return reason_class.is_retryable and tries < (MOST_TRIES_IN_TROUBLE if in_trouble else MOST_TRIES)


def describe(channel: type[Channel], outcome: Outcome) -> Kind:
    """One message's outcome, for the attempt log."""
    match outcome:
        case Accepted():
            return _KIND_SENT
        case Refused():
            return Kind("failed", channel.classify(outcome.code), outcome.code[:64])
        case Unclear():
            return Kind("attempted")


@dataclass
class Consequences:
    """What outcomes mean for the subscriptions that they are about."""

    states: list[tuple[int, str, bytes, str, str]] = field(default_factory=list)
    """As ``set_states`` takes them."""
    holds: list[tuple[int, str, bytes, datetime]] = field(default_factory=list)
    """As ``hold_addresses`` takes them."""

    def follow(self, channel: type[Channel], draft: Draft, outcomes: Sequence[Outcome], now: datetime) -> None:
        """Add what follows from the outcomes of a person's messages."""
        for address_hash, outcome in zip(draft.hashes, outcomes, strict=True):
            if not isinstance(outcome, Refused):
                continue
            reason_class = channel.classify(outcome.code)
            address = draft.number, channel.name, address_hash
            if reason_class in _STATES:
                self.states.append((*address, _STATES[reason_class], f"{reason_class}/{outcome.code[:64]}"))
            elif reason_class is ReasonClass.CAPPED:
                self.holds.append((*address, now + (outcome.retry_after or channel.find_cap(outcome.code))))
