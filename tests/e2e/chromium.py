"""Debian's Chromium over its DevTools protocol: browsers with profiles of their own, pages, and their service workers."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

PROGRAM = shutil.which("chromium")
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--remote-debugging-port=0"),
)


class ScriptFailed(Exception):
    """A script threw, or a command was refused."""


class Chromium:
    """One running browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        """Read what the browser says, until it is gone."""
        async for text in self._socket:
            message = json.loads(text)
            if future := self._answers.pop(message.get("id", 0), None):
                future.set_result(message)
                continue
            async with self._news:
                self.events.append(message)
                self._news.notify_all()

    async def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        await self._socket.send(json.dumps(message))
        answer = await asyncio.wait_for(future, 120)
        if "error" in answer:
            raise ScriptFailed(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def wait_for(self, find: Callable[[dict[str, Any]], Any]) -> Any:
        """The first thing that is found in an event, of the past too."""
        async with asyncio.timeout(120), self._news:
            while True:
                for event in self.events:
                    if found := find(event):
                        return found
                await self._news.wait()

    async def open_device(self, url: str, origin: str) -> Device:
        """A new profile that allows notifications, with a page."""
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        granted = {"permissions": ["notifications"], "origin": origin, "browserContextId": context}
        await self.call("Browser.grantPermissions", **granted)
        target = (await self.call("Target.createTarget", url=url, browserContextId=context))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        device = Device(self, session, context, origin)
        await self.call("Runtime.enable", session)
        await device.wait_until_loaded(url)
        await self.call("ServiceWorker.enable", session)
        return device


class Device:
    """One page in a profile of its own."""

    def __init__(self, browser: Chromium, session: str, context: str, origin: str) -> None:
        self._browser = browser
        self._session = session
        self._context = context
        self._origin = origin
        self._worker_session = ""

    async def wait_until_loaded(self, url: str) -> None:
        """Wait until the page is there: an empty one, which is complete as well, may stand in its place at first."""
        async with asyncio.timeout(120):
            while True:
                # What is asked of the empty page is refused when it goes.
                with suppress(ScriptFailed):
                    if await self.run(f"location.href === {url!r} && document.readyState === 'complete'"):
                        return
                await asyncio.sleep(0.05)

    async def run(self, script: str) -> Any:
        """The value of a script in the page, awaited where it is a promise."""
        return await self._evaluate(self._session, script)

    async def run_in_worker(self, script: str) -> Any:
        """The same in the page's service worker."""
        if not self._worker_session:
            attached = await self._browser.call("Target.attachToTarget", targetId=await self._find_worker(), flatten=True)
            self._worker_session = attached["sessionId"]
        return await self._evaluate(self._worker_session, script)

    async def _find_worker(self) -> str:
        """The target of the running worker; one that has nothing to do is ended by the browser after a while."""
        async with asyncio.timeout(120):
            while True:
                targets = (await self._browser.call("Target.getTargets"))["targetInfos"]
                for target in targets:
                    if target["type"] == "service_worker" and target.get("browserContextId") == self._context:
                        return str(target["targetId"])
                await self._browser.call("ServiceWorker.startWorker", self._session, scopeURL=f"{self._origin}/")
                await asyncio.sleep(0.1)

    async def push(self, text: str) -> None:
        """Hand the worker a message, as the browser does that got it from a push service and decrypted it."""

        def find(event: dict[str, Any]) -> str | None:
            if event.get("sessionId") != self._session or event["method"] != "ServiceWorker.workerRegistrationUpdated":
                return None
            registrations = event["params"]["registrations"]
            return str(registrations[0]["registrationId"]) if registrations else None

        registration = await self._browser.wait_for(find)
        parameters = {"origin": self._origin, "registrationId": registration, "data": text}
        await self._browser.call("ServiceWorker.deliverPushMessage", self._session, **parameters)

    async def _evaluate(self, session: str, script: str) -> Any:
        options = {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = await self._browser.call("Runtime.evaluate", session, **options)
        if "exceptionDetails" in answer:
            raise ScriptFailed(answer["exceptionDetails"].get("exception", {}).get("description", str(answer)))
        return answer["result"].get("value")


@asynccontextmanager
async def run_chromium(directory: Path) -> AsyncIterator[Chromium]:
    """A browser with an empty profile below ``directory``; it ends with the context."""
    assert PROGRAM is not None
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, *_OPTIONS, f"--user-data-dir={directory}", "about:blank"),
        stderr=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        port_file = directory / "DevToolsActivePort"
        async with asyncio.timeout(120):
            while not port_file.exists() or len(port_file.read_text().split()) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        port, path = port_file.read_text().split()
        # A crowded machine's browser answers no ping for a while.
        patience = {"open_timeout": 120, "ping_interval": None}
        async with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, **patience) as socket:
            browser = Chromium(socket)
            listening = asyncio.create_task(browser.listen())
            yield browser
            listening.cancel()
    finally:
        process.terminate()
        await process.wait()
