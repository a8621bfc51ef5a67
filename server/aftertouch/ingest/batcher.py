"""Group commit: what arrives within a few milliseconds, from everywhere in the process, becomes one transaction.

Only after its commit are the submitters answered, so an answer means durable. Receipts are only ever OR-ed, so a submitter
that never got its answer simply submits again; a stream's position is stored in the same transaction, so its batches go into
the log exactly once whatever is sent again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.errors import DatabaseUnavailable, ServerStopping, StreamSuperseded
from aftertouch.store.engine import transaction
from aftertouch.store.logs import Attempt, EventBatch, join_batches, store_attempts, store_events
from aftertouch.store.producers import Stream, lock_positions, set_positions

log = structlog.get_logger()

GATHER_SECONDS = 0.002
"""How long the first of a group waits for company: short against a commit, long enough to gather hundreds of webhooks."""
LARGEST_COMMIT = 100_000
"""Events in one transaction; more waits for the next."""
LARGEST_BACKLOG = 500_000
"""Events that may wait in a process; submitters are held back until there is room. About 30 bytes each, so 15 MB."""
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
    is_patient: bool = False
    """Waits while the database is away, however long; others are told."""
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """The one place of a process where events are made durable. Run ``run`` in a task; stop it with ``close``."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._waiting: deque[Submission] = deque()
        self._backlog = 0
        self._changed = asyncio.Condition()
        self._is_closed = False
        self.is_patient = True
        """Submissions that are patient wait for a database that is away; not any more once the process stops."""

    async def submit(self, submission: Submission) -> asyncio.Future[None]:
        """Take it when there is room, and return what is done when it is durable.

        The future raises ``DatabaseUnavailable`` (it may or may not be durable: submit it again), ``StreamSuperseded`` (it is
        not) or ``ServerStopping`` (likewise). Submissions of one stream are stored in the order in which they were taken.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_closed or self._backlog < LARGEST_BACKLOG)
            if self._is_closed:
                raise ServerStopping
            self._waiting.append(submission)
            self._backlog += len(submission.batch)
            self._changed.notify_all()
        return submission.done

    async def run(self) -> None:
        """Commit what is submitted until ``close``, then what is left."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._is_closed or bool(self._waiting))
                if not self._waiting:
                    return
            await asyncio.sleep(GATHER_SECONDS)
            await self._commit(self._take())

    async def close(self) -> None:
        """Take nothing more; ``run`` ends when all that was taken is durable, or the database is away."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _take(self) -> list[Submission]:
        group: list[Submission] = []
        count = 0
        while self._waiting and (not group or count + len(self._waiting[0].batch) <= LARGEST_COMMIT):
            group.append(self._waiting.popleft())
            count += len(group[-1].batch)
        return group

    async def _commit(self, group: list[Submission]) -> None:
        try:
            superseded = await self._store(group)
        except DatabaseUnavailable as error:
            is_kept = self.is_patient and not self._is_closed
            kept = [submission for submission in group if submission.is_patient and is_kept]
            self._waiting.extendleft(reversed(kept))
            await self._answer([submission for submission in group if not (submission.is_patient and is_kept)], error)
            await asyncio.sleep(RETRY_SECONDS)
        except Exception as error:
            # Every submitter gets the error and answers for it; the batcher itself goes on with the next group.
            log.exception("events were not stored", action="commit_events")
            await self._answer(group, error)
        else:
            for submission in superseded:
                assert submission.stream is not None
                _fail(submission, StreamSuperseded(submission.stream.producer))
            await self._answer(group, None)

    async def _answer(self, group: list[Submission], error: Exception | None) -> None:
        for submission in group:
            if error is not None:
                _fail(submission, error)
            elif not submission.done.done():
                submission.done.set_result(None)
        async with self._changed:
            self._backlog -= sum(len(submission.batch) for submission in group)
            self._changed.notify_all()

    async def _store(self, group: list[Submission]) -> list[Submission]:
        """Store the group in one transaction, without what is durable already, and return what a newer stream superseded."""
        async with transaction(self._engine) as conn:
            streams = {submission.stream for submission in group if submission.stream is not None}
            positions = await lock_positions(conn, streams) if streams else {}
            superseded = [s for s in group if s.stream is not None and s.stream not in positions]
            # After a connection broke during COMMIT nobody knows whether it happened; the stored position does.
            fresh = [s for s in group if s.stream is None or s.position > positions.get(s.stream, s.position)]
            if fresh:
                await store_events(conn, join_batches([submission.batch for submission in fresh]))
                await store_attempts(conn, [attempt for submission in fresh for attempt in submission.attempts])
            reached = {s.stream: s.position for s in fresh if s.stream is not None}
            if reached:
                await set_positions(conn, reached)
        return superseded


def _fail(submission: Submission, error: Exception) -> None:
    """Tell the submitter, if it is still there: cancelling a call cancels the future that it awaits."""
    if not submission.done.done():
        submission.done.set_exception(error)
        # Taken note of here: of a stream's batches only the first that fails is awaited.
        submission.done.exception()
