"""Resource names: taken apart, checked against the caller's app, and put together."""

from __future__ import annotations

import secrets

from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.rpc.interceptor import Call

_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"


def check_parent(call: Call, name: str, field: str = "parent") -> None:
    """Raise unless ``name`` is that of the caller's own app."""
    parts = name.split("/")
    if len(parts) != 2 or parts[0] != "apps" or not parts[1]:
        raise FieldsInvalid([Violation(field, f"must be like {call.app.name}")])
    call.check_app(parts[1], name)


def read_name(call: Call, name: str, collection: str, field: str = "name") -> str:
    """The last part of ``apps/{app}/<collection>/{id}``, which must be of the caller's own app."""
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "apps" or parts[2] != collection or not all(parts):
        raise FieldsInvalid([Violation(field, f"must be like {call.app.name}/{collection}/…")])
    call.check_app(parts[1], name)
    return parts[3]


def read_channel_name(name: str) -> str:
    """The last part of ``channels/{channel}``."""
    collection, _, channel = name.partition("/")
    if collection != "channels" or not channel:
        raise FieldsInvalid([Violation("name", "must be like channels/sms")])
    if "/" in channel:
        raise NotFound(name)
    return channel


def make_campaign_id() -> str:
    """An id for a campaign whose caller chose none."""
    return "c-" + "".join(secrets.choice(_ALPHABET) for _ in range(12))
