"""Whom WhatsApp messages go to, and what is meant by what they answer."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field
from pydantic_extra_types.phone_numbers import PhoneNumberValidator

from aftertouch.channels import CHECKED_ONCE, Address, Reply, Standing

STOP = frozenset(("STOP", "STOPALL", "STOP PROMOTIONS", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT"))
START = frozenset(("START", "UNSTOP"))
"""Words that are all of a text, or on a button. No provider acts on them, but asks that they are respected (WhatsApp Business
Messaging Policy); "Stop promotions" is the button that it proposes."""


class WhatsAppAddress(Address):
    """A phone number."""

    phone: Annotated[str, PhoneNumberValidator(number_format="E164"), CHECKED_ONCE] = Field(repr=False)

    @property
    def key(self) -> str:
        return self.phone


def read_answer(
    address: WhatsAppAddress, words: tuple[str, ...], message_id: str | None = None, time: datetime | None = None
) -> Reply | Standing:
    """A reply, or a word that ends or resumes their subscription: what somebody wrote, or the button that they pressed."""
    said = {word.strip().upper() for word in words}
    if said & STOP:
        return Standing(address=address, state="opted_out", reason="STOP", time=time)
    if said & START:
        return Standing(address=address, state="active", reason="START", time=time)
    return Reply(address=address, message_id=message_id, time=time)
