"""What a channel's outcomes mean."""

from __future__ import annotations

from decimal import Decimal

import pytest

from aftertouch.channels import Accepted, Price
from aftertouch.delivery.outcomes import list_prices
from aftertouch.store.kinds import Kind


def accept(amount: str, currency: str = "USD") -> Accepted:
    return Accepted(price=Price(amount=Decimal(amount), currency=currency))


def test_prices_of_a_persons_messages_are_one_amount_for_each_currency() -> None:
    """Bits would keep one of two that cost the same."""
    accepted = [accept("0.0079"), accept("0.0079"), accept("1", "EUR"), Accepted(), accept("0.00000049", "EUR")]
    assert list_prices(accepted) == [Kind("priced", "EUR", "1"), Kind("priced", "USD", "0.0158")]
    assert list_prices([Accepted()]) == []
    assert list_prices([accept("999999.999999"), accept("0")]) == [Kind("priced", "USD", "999999.999999")]


@pytest.mark.parametrize(
    ("amount", "currency"),
    [(Decimal(-1), "USD"), (Decimal("NaN"), "USD"), (Decimal("Infinity"), "USD"), (Decimal(1_000_000), "USD"), (0.5, "USD")]
    + [(Decimal(1), currency) for currency in ("", "usd", "EURO")],
)
def test_price_that_is_none_is_refused(amount: Decimal, currency: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        Price(amount=amount, currency=currency)
