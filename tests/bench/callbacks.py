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

import aiohttp
from twilio.request_validator import RequestValidator
from yarl import URL

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
    """Send all, 128 at a time, and return the seconds until the last is answered; each has to be answered 204."""
    left = iter(requests)

    async def send(session: aiohttp.ClientSession) -> None:
        for address, body, signature in left:
            headers = {"content-type": "application/x-www-form-urlencoded", "x-twilio-signature": signature}
            async with session.post(URL(address, encoded=True), data=body, headers=headers) as response:
                if response.status != 204:
                    raise RuntimeError(f"answered {response.status}")

    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        began = time.perf_counter()
        await asyncio.gather(*(send(session) for _ in range(CONNECTIONS)))
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
    print(asyncio.run(send_callbacks(json.loads(Path(sys.argv[1]).read_text()))))
