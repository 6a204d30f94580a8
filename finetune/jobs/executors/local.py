"""Runs jobs on this machine: keeps one worker process alive for as long as the server lives."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

log = logging.getLogger("espalier.executor")

FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0
# A worker that has run this long was well; the next death starts counting anew.
WELL_SECONDS = 30.0
STOP_SECONDS = 20.0


class LocalExecutor:
    """`pid`: of the worker process, None while there is none. Its output goes to `<home>/worker.log`."""

    def __init__(self, *, database: str, home: Path, repository: Path, backbones: dict[str, str]) -> None:
        self.command = [
            *(sys.executable, "-m", "finetune.jobs.worker", "--database", database, "--home", str(home)),
            *("--repository", str(repository), "--backbones", msgspec.json.encode(backbones).decode()),
        ]
        self.log_file = home / "worker.log"
        self.process: asyncio.subprocess.Process | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    async def start(self) -> None:
        """Start the worker, and start it again whenever it dies."""
        self.task = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Ask the worker to stop; it gives its job back within a step. Kill it when it does not."""
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
        if self.process is None or self.process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            log.warning("the worker does not stop within %.0f s and is killed; its job resumes later", STOP_SECONDS)
            self.process.kill()
            await self.process.wait()

    async def _supervise(self) -> None:
        wait, reason = FIRST_WAIT, "the server stopped"
        while True:
            started = time.monotonic()
            with self.log_file.open("ab") as output:
                self.process = await asyncio.create_subprocess_exec(
                    *self.command,
                    "--after",
                    reason,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,  # a signal to the server's group is for the server, which tells its worker
                )
            status = await self.process.wait()
            reason = f"the worker process died ({_words(status)})"
            wait = FIRST_WAIT if time.monotonic() - started > WELL_SECONDS else min(2 * wait, LONGEST_WAIT)
            log.error("%s; its log is %s; starting it again in %.1f s", reason, self.log_file, wait)
            await asyncio.sleep(wait)


def _words(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    killed = " (often: out of memory)" if -status == signal.SIGKILL else ""
    return f"signal {-status}{killed}"
