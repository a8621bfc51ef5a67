"""Twilio's Messages resource, for every channel that goes over it: one form posted for each message, and signed callbacks.

The token travels in the query of each message's StatusCallback, so a callback settles even a message whose creation was never
answered. Twilio has no idempotency key for messages: a request that may have arrived is never sent again.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hmac import compare_digest
from urllib.parse import parse_qsl, urlencode

from multidict import MultiDict, MultiDictProxy
from pydantic import SecretStr
from twilio.request_validator import RequestValidator

from aftertouch.channels import (
    Accepted,
    InvalidSignature,
    InvalidWebhook,
    Outcome,
    ReasonClass,
    Receipt,
    Refused,
    Unclear,
    Webhook,
    WebhookRequest,
    parse_retry_after,
)
from aftertouch.http import Answer, HttpClient, NoAnswer, NotSent, encode_headers, split_url

ACCOUNT_SID = r"^AC[0-9a-fA-F]{32}$"
SERVICE_SID = r"^MG[0-9a-fA-F]{32}$"
API_URL = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/?$"

TOKEN = re.compile(r"[A-Za-z0-9_-]{24}")

SIGNALS: Mapping[str, str | None] = {
    "accepted": None,
    "scheduled": None,
    "queued": None,
    "sending": None,
    "sent": "sent",
    "partially_delivered": "sent",
    "delivered": "delivered",
    "read": "read",  # of WhatsApp and RCS
    "undelivered": "failed",
    "failed": "failed",
    "canceled": "failed",  # by somebody at Twilio; we schedule nothing there
}
"""Twilio's message statuses, and the signal of each that is news (Twilio: Message resource, "Message status values")."""

CODES: Mapping[ReasonClass, Sequence[str]] = {
    ReasonClass.RECIPIENT_GONE: (
        *("21211", "21217", "21401"),  # not a phone number
        *("21614", "21635"),  # not a mobile number
        *("30005", "30006", "30011"),  # unknown handset, a landline, no MMS
        *("63003", "63024", "63033"),  # channel address not valid, or blocked
    ),
    ReasonClass.OPTED_OUT: ("21610", "63014"),
    ReasonClass.CAPPED: ("63032", "63049"),
    ReasonClass.WINDOW: ("63016",),
    ReasonClass.CONTENT: (
        *("21602", "21617"),
        "21612",  # this sender cannot reach this number
        *("30004", "30007", "30450"),  # blocked by the recipient or filtered by the carrier
        "30036",  # its validity period is over
    ),
    ReasonClass.CONFIG: (
        *("20003", "20005", "20404", "21408", "21608", "21609", "30002"),  # account, permissions, callback address
        *("21212", "21603", "21606", "21654", "21655", "21656", "21701", "21702", "21703", "21704", "21705"),  # sender, content
        "21910",  # sender and recipient are of different channels
        *("30018", "30024", "30032", "30033", "30034", "30035"),  # sender registration
        *("63001", "63002", "63005", "63007", "63008", "63013", "63021", "63026", "63051"),  # channel set-up and policy
        *("63027", "63028", "63030", "63040", "63041", "63042"),  # templates
        *("http_400", "http_401", "http_403", "http_404"),
        *(f"http_{status}" for status in range(300, 400)),  # the API does not redirect: the address is wrong
    ),
    ReasonClass.RATE: (
        *("20429", "14107", "http_429"),
        *("21611", "30001", "30022", "30023", "30027"),  # sender's queue or daily limit
        *("63017", "63018", "63038", "63119"),
    ),
    ReasonClass.TRANSIENT: (
        *("connect_error", "20500", "20503"),
        *("30003", "30008", "30017", "30020", "30021", "30410"),  # handset off, carrier congested or silent
        *("63009", "63010", "63012"),
        *(f"http_{status}" for status in range(500, 600)),
    ),
}
"""Twilio: Error and Warning Dictionary, which is one for all of its channels; a Messaging Service may use several."""


REASONS: Mapping[str, ReasonClass] = {code: reason for reason, codes in CODES.items() for code in codes}


class Messages:
    """The messages of one account and one sender."""

    def __init__(
        self, *, account_sid: str, auth_token: SecretStr, api_url: str, webhook_url: str, options: Mapping[str, str]
    ) -> None:
        """``options`` are the fields that all messages have: ``From`` or ``MessagingServiceSid``."""
        self._validator = RequestValidator(auth_token.get_secret_value())
        self._webhook_url = webhook_url
        self._options = options
        self.origin, base = split_url(api_url)
        self.base = base.rstrip("/")
        self.target = f"{self.base}/2010-04-01/Accounts/{account_sid}/Messages.json"
        credentials = b64encode(f"{account_sid}:{auth_token.get_secret_value()}".encode()).decode()
        self.headers = encode_headers({"Authorization": f"Basic {credentials}", "Accept": "application/json"})
        self._form_headers = self.headers + encode_headers({"Content-Type": "application/x-www-form-urlencoded"})

    async def create(self, http: HttpClient, token: str, fields: Mapping[str, str]) -> Outcome:
        """Have Twilio send one message."""
        form = {
            **fields,
            # By default Twilio calls back once more at most, and only when it could not connect. The fragment asks for five
            # more attempts after any failure (Twilio: Webhooks, "Connection overrides"); it is not part of the request.
            "StatusCallback": f"{self._webhook_url}?t={token}#rc=5&rp=all",
            **self._options,
        }
        try:
            answer = await http.post(self.origin, self.target, self._form_headers, urlencode(form).encode())
        except NotSent:
            return Refused(code="connect_error")
        except NoAnswer as error:
            return Unclear(detail=str(error))
        return judge_answer(answer)

    def verify(self, request: WebhookRequest) -> None:
        """Check Twilio's signature over the address and the form (Twilio: "Validating requests").

        The algorithm is HMAC-SHA1 with the account's token, whatever a header asks for.
        """
        try:
            form = parse_form(request.body)
        except ValueError as error:
            raise InvalidSignature from error
        signature = request.headers.get("x-twilio-signature", "")
        if request.method != "POST":
            raise InvalidSignature
        # The validator computes two signatures, with the port and without; nearly always the address as it is will do.
        expected = self._validator.compute_signature(request.url, form)
        if not compare_digest(expected.encode(), signature.encode()) and not self._validator.validate(
            request.url, form, signature
        ):
            raise InvalidSignature


def judge_answer(answer: Answer) -> Outcome:
    """Say what an answer of the Messages resource means."""
    created = parse_object(answer.body)
    if 200 <= answer.status <= 299:
        if created is None:
            return Unclear(detail=f"http_{answer.status} without a JSON object")
        sid = created.get("sid")
        return Accepted(message_id=sid if isinstance(sid, str) else "")
    code = (created or {}).get("code")
    if not isinstance(code, int):
        if answer.status in (502, 504):
            # Only a gateway spoke: what stands behind it may have taken the message before it fell silent.
            return Unclear(detail=f"http_{answer.status}")
        code = f"http_{answer.status}"
    return Refused(code=str(code), retry_after=parse_retry_after(answer.headers.get("retry-after")))


def parse_object(body: bytes | None) -> dict[str, object] | None:
    try:
        value = json.loads(body or b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@lru_cache(maxsize=1)
def parse_form(body: bytes) -> MultiDictProxy[str]:
    """Read a form as Twilio signs it: in UTF-8, blank values kept. The last is remembered: a request is verified, then parsed.

    Raises:
        ValueError: it is not UTF-8, or has more fields than any of Twilio's requests.
    """
    return MultiDictProxy(MultiDict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)))


def read_form(request: WebhookRequest) -> tuple[MultiDictProxy[str], str]:
    """The form of a webhook, and the status of the message that it is about.

    Raises:
        InvalidWebhook: it is no form.
    """
    try:
        form = parse_form(request.body)
    except ValueError as error:
        raise InvalidWebhook("the body is not a form") from error
    return form, form.get("MessageStatus", form.get("SmsStatus", ""))


def read_status(request: WebhookRequest, form: Mapping[str, str], status: str, signals: Mapping[str, str | None]) -> Webhook:
    """What a status callback says, in the channel's own signals."""
    message_id = form.get("MessageSid") or None
    token = request.query.get("t", "")
    if status not in signals or (message_id is None and TOKEN.fullmatch(token) is None):
        return Webhook(unrecognized=(f"MessageStatus={status[:64]} MessageSid={(message_id or '')[:64]}",))
    signal = signals[status]
    if signal is None:
        return Webhook()
    receipt = Receipt(
        signal=signal,
        token=token if TOKEN.fullmatch(token) else None,
        message_id=message_id,
        code=form.get("ErrorCode") or None if signal == "failed" else None,
    )
    return Webhook(receipts=(receipt,))
