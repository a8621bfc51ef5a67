"""A provider's side of ``make bench-ingest``, as a process of its own: signed status callbacks over kept-alive connections.

``python -m tests.bench.callbacks <file>`` reads the prepared requests, sends them and prints the seconds they took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvloop
from twilio.request_validator import RequestValidator

from aftertouch.http import HttpClient, encode_headers, split_url

CONNECTIONS = 128


def sign_callbacks(url: str, account_sid: str, auth_token: str, tokens: list[str]) -> list[list[str]]:
    """Address, body and signature of a callback for each token, as Twilio's are."""
    validator = RequestValidator(auth_token)
    requests = []
    for number, token in enumerate(tokens):
        form = {
            "AccountSid": account_sid,
            "ApiVersion": "2010-04-01",
            "From": "+15005550006",
            "MessageSid": f"SM{number:032x}",
            "MessageStatus": ("sent", "delivered")[number % 2],
            "SmsSid": f"SM{number:032x}",
            "SmsStatus": ("sent", "delivered")[number % 2],
            "To": f"+1500{number:07d}",
        }
        address = f"{url}?t={token}"
        requests.append([address, urlencode(form), validator.compute_signature(address, form)])
    return requests


async def send_callbacks(requests: list[list[str]]) -> float:
    """Send all, 128 at a time, and return the seconds until the last is answered; each has to be answered 204.

    By our own client, on uvloop: aiohttp's takes more of a core than the server that is measured.
    """
    form = encode_headers({"content-type": "application/x-www-form-urlencoded"})
    prepared = iter(
        [
            (*split_url(address), form + encode_headers({"x-twilio-signature": signature}), body.encode())
            for address, body, signature in requests
        ]
    )

    async def send(client: HttpClient) -> None:
        for request in prepared:
            answer = await client.post(*request)
            if answer.status != 204:
                raise RuntimeError(f"answered {answer.status}")

    async with HttpClient(timeout=60) as client:
        began = time.perf_counter()
        await asyncio.gather(*(send(client) for _ in range(CONNECTIONS)))
        return time.perf_counter() - began


async def run_apart(file: Path) -> float:
    """``send_callbacks`` of the requests in a file, in a process of its own."""
    command: list[Any] = [sys.executable, "-m", "tests.bench.callbacks", file]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError("the callbacks were not all taken")
    return float(output)


if __name__ == "__main__":
    print(uvloop.run(send_callbacks(json.loads(Path(sys.argv[1]).read_text()))))
