"""Identities and the vault: what is signed or sealed says what it said, and nothing else."""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftertouch.identity import LONGEST, InvalidIdentity, read_identity, sign_identity
from aftertouch.ingest.enrolment import is_external_id
from aftertouch.v1 import contacts_pb2
from aftertouch.vault import SealBroken, Vault

LATER = datetime(2100, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_identity_names_whom_it_was_signed_for(external_id: str) -> None:
    identity = sign_identity("secret", external_id, LATER)
    assert len(identity) <= LONGEST
    assert read_identity(["another", "secret"], identity, NOW) == external_id


@given(st.integers(0, 100), st.characters(max_codepoint=0x2FF))
def test_changed_identity_is_invalid(at: int, character: str) -> None:
    identity = sign_identity("secret", "ada", LATER)
    changed = identity[: at % len(identity)] + character + identity[at % len(identity) + 1 :]
    if changed != identity:
        with pytest.raises(InvalidIdentity):
            read_identity(["secret"], changed, NOW)


def test_identity_expires() -> None:
    identity = sign_identity("secret", "ada", NOW)
    assert read_identity(["secret"], identity, NOW - timedelta(seconds=1)) == "ada"
    with pytest.raises(InvalidIdentity, match="expired"):
        read_identity(["secret"], identity, NOW)


@pytest.mark.parametrize(
    ("expiry", "name", "cause"),
    [
        ("1e10", "YWRh", "expiry is no whole number"),
        ("", "YWRh", "expiry is no whole number"),
        ("4102444800", "YWRhZ", "external_id is no base64url"),
        ("4102444800", "YWR h", "external_id is no base64url"),
        ("4102444800", "_w", "external_id is no base64url"),
    ],
)
def test_signed_identity_of_another_form_is_invalid_and_says_why(expiry: str, name: str, cause: str) -> None:
    """Whoever wrote a backend in another language got a 500."""
    signed = f"v1.{expiry}.{name}"
    signature = urlsafe_b64encode(hmac.digest(b"secret", signed.encode(), "sha256")).rstrip(b"=").decode()
    with pytest.raises(InvalidIdentity, match=cause):
        read_identity(["secret"], f"{signed}.{signature}", NOW)


def test_naive_expiry_is_refused() -> None:
    with pytest.raises(ValueError, match="aware"):
        sign_identity("secret", "ada", datetime(2026, 1, 1))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=6))
def test_external_id_is_judged_as_the_api_judges_it(text: str) -> None:
    from aftertouch.errors import FieldsInvalid
    from aftertouch.rpc.validation import check_message

    try:
        check_message(contacts_pb2.Contact(external_id=text))
        is_taken = bool(text)
    except FieldsInvalid:
        is_taken = False
    assert is_external_id(text) == is_taken


def test_vault_opens_what_it_sealed_for_the_same_name_only() -> None:
    vault = Vault(b"key")
    sealed = vault.seal(1, "identity", "a secret")
    assert vault.open(1, "identity", sealed) == "a secret"
    assert vault.seal(1, "identity", "a secret") != sealed
    for other, app_id, name in ((vault, 2, "identity"), (vault, 1, "keys/push"), (Vault(b"another"), 1, "identity")):
        with pytest.raises(SealBroken):
            other.open(app_id, name, sealed)
