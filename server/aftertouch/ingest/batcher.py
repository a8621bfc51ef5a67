"""Group commit: what arrives within a few milliseconds, from everywhere in the process, becomes one transaction.

Only after its commit are the submitters answered, so an answer means durable. Receipts are only ever OR-ed, so a submitter
that never got its answer simply submits again; a stream's position is stored in the same transaction, so its batches go into
the log exactly once whatever is sent again.

While one transaction writes receipts and commits, the next may already write its part of the log, where nobody meets anybody.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch import metrics
from aftertouch.errors import AftertouchError, DatabaseUnavailable, PositionOutOfOrder, ServerStopping, StreamSuperseded
from aftertouch.store.engine import transaction
from aftertouch.store.logs import Attempt, EventBatch, count_events, join_batches, log_events, store_attempts
from aftertouch.store.producers import Progress, Stream, lock_positions, set_positions

log = structlog.get_logger()

GATHER_SECONDS = 0.002
"""How long the first of a group waits for company: short against a commit, long enough to gather hundreds of webhooks."""
LARGEST_COMMIT = 100_000
"""Events in one transaction; more waits for the next."""
LARGEST_BACKLOG = 500_000
"""Events that may wait in a process. About 30 bytes each, so 15 MB, and four times as much while they are written."""
STREAMED_PERCENT = 80
"""Of it that streams may take, which are held back until there is room; the rest is for those who wait for an answer."""
RETRY_SECONDS = 0.25
"""Between two tries while the database is away."""


@dataclass(frozen=True)
class Submission:
    """Something to make durable, and who waits for it."""

    batch: EventBatch
    attempts: Sequence[Attempt] = ()
    stream: Stream | None = None
    position: int = 0
    """Of the batch in its stream."""
    rejected: int = 0
    """Events of the batch that were left out, to be counted with it."""
    is_patient: bool = False
    """Waits while the database is away, however long; others are told."""
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Stale(Exception):
    """Some of a group must not be stored: they are durable already, or refused."""

    def __init__(self, durable: Sequence[Submission], refused: Mapping[Stream, AftertouchError]) -> None:
        super().__init__()
        self.durable = durable
        self.refused = refused


class _Overtaken(Exception):
    """The commit before did not go through at once; this one has to come after it all the same."""


class _Commit:
    """A group on its way, and what the one after it waits for."""

    def __init__(self, group: list[Submission], before: _Commit | None) -> None:
        self.group = group
        self.before = before
        self.is_logged = False
        """Its part of the log is written: it holds every lock there that it will need."""
        self.settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether it went through at the first try."""
        self.task: asyncio.Task[None] | None = None


class Batcher:
    """The one place of a process where events are made durable. Run ``run`` in a task; stop it with ``close``."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._prompt: deque[Submission] = deque()
        """What somebody waits for an answer to: a webhook, a call, a message that was sent."""
        self._streamed: deque[Submission] = deque()
        """What streams brought, which comes after it: a client that pours delays nobody."""
        self._backlog = 0
        self._commits: deque[_Commit] = deque()
        """One, or two when there is much to do."""
        self._changed = asyncio.Condition()
        self._is_closed = False
        self.is_patient = True
        """Submissions that are patient wait for a database that is away; not any more once the process stops."""

    async def submit(self, submission: Submission) -> asyncio.Future[None]:
        """Take it when there is room, and return what is done when it is durable.

        A stream's is held back while there is no room, as is what waits for the database anyway; others are told.

        The future raises ``DatabaseUnavailable`` (it may or may not be durable: submit it again), or that it is not:
        ``StreamSuperseded``, or ``PositionOutOfOrder`` after one of its stream that could not be stored. ``submit`` itself raises
        ``ServerStopping``. Submissions of one stream are stored in the order in which they were taken, and none without those
        before it.
        """
        most = LARGEST_BACKLOG if submission.stream is None else LARGEST_BACKLOG * STREAMED_PERCENT // 100
        async with self._changed:
            if submission.is_patient:
                await self._changed.wait_for(lambda: self._is_closed or self._backlog < most)
            if self._is_closed:
                raise ServerStopping
            if self._backlog >= most:
                raise DatabaseUnavailable
            (self._prompt if submission.stream is None else self._streamed).append(submission)
            self._backlog += len(submission.batch)
            self._changed.notify_all()
        return submission.done

    async def run(self) -> None:
        """Commit what is submitted until ``close``, then what is left."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._may_begin() or (self._is_closed and not self._is_waiting))
                if not self._is_waiting:
                    break
            if not self._commits:
                await asyncio.sleep(GATHER_SECONDS)
            commit = _Commit(self._take(), self._commits[-1] if self._commits else None)
            self._commits.append(commit)
            commit.task = asyncio.create_task(self._commit(commit), name="commit events")
        async with self._changed:
            await self._changed.wait_for(lambda: not self._commits)

    async def close(self) -> None:
        """Take nothing more; ``run`` ends when all that was taken is durable, or the database is away."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def waiting_count(self) -> int:
        """Events that are not durable yet."""
        return self._backlog

    @property
    def _is_waiting(self) -> bool:
        return bool(self._prompt or self._streamed)

    def _may_begin(self) -> bool:
        """A second transaction takes part in the work when it will be a whole one; smaller ones gather more company."""
        if not self._is_waiting or len(self._commits) > 1:
            return False
        if not self._commits:
            return True
        under_way = sum(len(submission.batch) for submission in self._commits[0].group)
        return self._commits[0].is_logged and self._backlog - under_way >= LARGEST_COMMIT

    def _take(self) -> list[Submission]:
        group: list[Submission] = []
        count = 0
        # Half of it for the prompt ones at first: calls that pour delay no stream either.
        parts = ((self._prompt, LARGEST_COMMIT // 2), (self._streamed, LARGEST_COMMIT), (self._prompt, LARGEST_COMMIT))
        for waiting, most in parts:
            while waiting and (not group or count + len(waiting[0].batch) <= most):
                group.append(waiting.popleft())
                count += len(group[-1].batch)
        return group

    async def _commit(self, commit: _Commit) -> None:
        while commit.group:
            try:
                await self._store(commit)
            except _Overtaken:
                assert commit.before is not None
                assert commit.before.task is not None
                await asyncio.wait({commit.before.task})
                commit.before = None
            except _Stale as stale:
                _settle(commit, is_done=False)
                await self._answer(commit, stale.durable, None)
                for stream, error in stale.refused.items():
                    await self._answer(commit, [s for s in commit.group if s.stream == stream], error)
            except DatabaseUnavailable as error:
                is_kept = self.is_patient and not self._is_closed
                await self._answer(commit, [s for s in commit.group if not (s.is_patient and is_kept)], error)
                _settle(commit, is_done=False)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:
                # Every submitter gets the error and answers for it; the batcher itself goes on with the next group.
                log.exception("events were not stored", action="commit_events")
                await self._answer(commit, commit.group, error)
            else:
                await self._answer(commit, commit.group, None)
        _settle(commit, is_done=True)
        commit.before = None
        async with self._changed:
            self._commits.remove(commit)
            self._changed.notify_all()

    async def _answer(self, commit: _Commit, answered: Sequence[Submission], error: Exception | None) -> None:
        for submission in answered:
            if error is not None:
                _fail(submission, error)
            elif not submission.done.done():
                submission.done.set_result(None)
        gone = set(map(id, answered))
        async with self._changed:
            commit.group = [submission for submission in commit.group if id(submission) not in gone]
            self._backlog -= sum(len(submission.batch) for submission in answered)
            self._changed.notify_all()

    async def _store(self, commit: _Commit) -> None:
        """Store the group in one transaction.

        Raises:
            _Stale, _Overtaken: nothing was stored.
        """
        batch = join_batches([submission.batch for submission in commit.group])
        begun_at = time.monotonic()
        async with transaction(self._engine) as conn:
            await log_events(conn, batch)
            await store_attempts(conn, [attempt for submission in commit.group for attempt in submission.attempts])
            async with self._changed:
                commit.is_logged = True
                self._changed.notify_all()
            # The rest comes in turn. One that failed may need locks for its next try that others wait for behind this one.
            if commit.before is not None and not await commit.before.settled:
                raise _Overtaken
            await self._move_positions(conn, commit.group)
            await count_events(conn, batch)
        metrics.COMMITS.observe(time.monotonic() - begun_at)
        metrics.EVENTS.inc(len(batch))

    async def _move_positions(self, conn: AsyncConnection, group: Sequence[Submission]) -> None:
        """Store how far the streams are, unless something is in the group that must not be.

        Raises:
            _Stale.
        """
        streams: dict[Stream, list[Submission]] = {}
        for submission in group:
            if submission.stream is not None:
                streams.setdefault(submission.stream, []).append(submission)
        if not streams:
            return
        positions = await lock_positions(conn, streams.keys())
        durable: list[Submission] = []
        refused: dict[Stream, AftertouchError] = {}
        for stream, own in streams.items():
            if stream not in positions:
                refused[stream] = StreamSuperseded(stream.producer)
                continue
            # After a connection broke during COMMIT nobody knows whether it happened; the stored position does.
            durable += [submission for submission in own if submission.position <= positions[stream]]
            after = min((s.position for s in own if s.position > positions[stream]), default=None)
            if after is not None and after != positions[stream] + 1:
                # What was between could not be stored: a client that reads of a later position would forget it.
                refused[stream] = PositionOutOfOrder(stream.producer, positions[stream] + 1, after)
        if durable or refused:
            raise _Stale(durable, refused)
        await set_positions(
            conn,
            {
                stream: Progress(own[-1].position, sum(len(s.batch) for s in own), sum(s.rejected for s in own))
                for stream, own in streams.items()
            },
        )


def _settle(commit: _Commit, *, is_done: bool) -> None:
    if not commit.settled.done():
        commit.settled.set_result(is_done)


def _fail(submission: Submission, error: Exception) -> None:
    """Tell the submitter, if it is still there: cancelling a call cancels the future that it awaits."""
    if not submission.done.done():
        submission.done.set_exception(error)
        # Taken note of here: of a stream's batches only the first that fails is awaited.
        submission.done.exception()
