"""The memory that models take, by their footprints, and the bound on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from server.runtime.served import Standing

log = logging.getLogger("espalier.memory")

# How often it is looked whether an evicted model has answered what it held.
LOOK_SECONDS = 0.01


class Memory:
    """budget: bytes, 0: no bound. taken: of all that is loaded, being loaded or not yet closed. leaving: of what is no
    longer served and not yet closed. coming: loads that have their room and are not ready."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.taken = self.leaving = self.coming = 0

    async def reserve(
        self, room: int, standings: Callable[[], Sequence[Standing]], evict: Callable[[], bool], *, insist: bool
    ) -> bool:
        """Take room for what is to be loaded, and evict for it. Whether there is any: False at once where what is not
        evicted leaves too little, but for one who insists. evict: has one less, False where none can go now."""
        while self.budget and self.taken + room > self.budget:
            if self.taken - self.leaving + room > self.budget:
                there = standings()
                lasting = sum(standing.bytes for standing in there if not standing.lazy)
                if not insist and lasting + room > self.budget:
                    return False
                if evict():
                    continue
                if insist and not self.coming and not any(standing.lazy for standing in there):
                    log.warning("models take %d bytes more than they may", self.taken + room - self.budget)
                    break
            await asyncio.sleep(LOOK_SECONDS)
        self.taken += room
        self.coming += 1
        return True

    def loaded(self, room: int, ready: bool) -> None:
        """What room was reserved for is ready, or did not load."""
        self.coming -= 1
        if not ready:
            self.taken -= room

    def free(self, room: int) -> None:
        """What was leaving is closed."""
        self.taken -= room
        self.leaving -= room
