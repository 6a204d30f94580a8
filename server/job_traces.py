"""Traces of fine-tuning jobs: when one has ended, what the job store has noted of its states is sent as spans."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from finetune.jobs.store import JobStore

if TYPE_CHECKING:
    from server.spans import Sender

log = logging.getLogger("espalier.traces")

LOOK_SECONDS = 5.0
# A job's end is written by another machine, with its clock, and may come to be seen later than it was.
LATE_SECONDS = 120.0


class JobTraces:
    """Tells of the jobs that end while this server runs."""

    def __init__(self, store: JobStore, sender: Sender) -> None:
        self.store, self.sender = store, sender
        self.began = time.time()
        self.told: dict[str, float] = {}  # ids of jobs, and when they ended
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self._look_again())

    async def stop(self) -> None:
        """Tell of those that ended last."""
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
        await self._safely()

    def look(self) -> None:
        """Tell of the jobs that have ended and were not told of."""
        since = max(self.began, time.time() - LATE_SECONDS)
        self.told = {job: ended for job, ended in self.told.items() if ended > since - LATE_SECONDS}
        for job in self.store.finished_since(since):
            if job.id not in self.told and job.finished_at is not None:
                self.told[job.id] = job.finished_at
                self.sender.send_job(job, self.store.stages(job.id))

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._safely()

    async def _safely(self) -> None:
        try:
            await asyncio.to_thread(self.look)
        except Exception as error:
            log.error("jobs that ended are not traced: %s", error)
