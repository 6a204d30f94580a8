"""Records from one process to another through shared memory: one writes, one reads, in order.

Positions only grow; a position modulo the capacity is a place. A record lies in one piece: where the end of the ring
is too near for it, a skip fills the rest. The writer publishes what it has written by one store of `head`, the reader
gives room back by one store of `tail`. A reader that wants to be woken sets `armed`; the writer takes that back and
writes to the reader's eventfd, so that many records cost one wake-up, and none while one is under way.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

ALIGNMENT = 64
# Head, tail and armed lie on cache lines of their own: what one process writes must not take the other's away.
HEAD, TAIL, ARMED = 0, 8, 16
WORDS = 8
PREAMBLE = 4096

RECORD = struct.Struct("<QQ")  # bytes of the content, and whether it is one
CONTENT, SKIP = 0, 1

_turnstile = threading.Lock()


def fence() -> None:
    """What this thread has stored is seen by all before what it loads and stores next: a lock's atomic instructions
    are a full barrier on x86, and a release followed by an acquire is one on ARM."""
    _turnstile.acquire()
    _turnstile.release()
    _turnstile.acquire()
    _turnstile.release()


class Ring:
    """Either end. memory: PREAMBLE and the capacity, a power of two; zeros at first. wake: the reader's eventfd."""

    def __init__(self, memory: memoryview, wake: int) -> None:
        self.capacity = len(memory) - PREAMBLE
        if self.capacity & (self.capacity - 1):
            raise ValueError(f"a ring of {self.capacity} bytes; it must be a power of two")
        self.words = memory[:PREAMBLE].cast("Q")
        self.places = memory[PREAMBLE:]
        self.wake = wake
        # Of a writer: how far it has written. Of a reader: how far it has read.
        self.position = self.words[HEAD]

    def reserve(self, size: int) -> memoryview | None:
        """Room for a record of so many bytes, to be filled before `publish`; None where the ring is too full for it."""
        needed = -(-(RECORD.size + size) // ALIGNMENT) * ALIGNMENT
        place = self.position & (self.capacity - 1)
        left = self.capacity - place
        skipped = left if needed > left else 0
        if self.position + skipped + needed - self.words[TAIL] > self.capacity:
            return None
        if skipped:
            RECORD.pack_into(self.places, place, 0, SKIP)
            self.position += skipped
            place = 0
        RECORD.pack_into(self.places, place, size, CONTENT)
        self.position += needed
        return self.places[place + RECORD.size : place + RECORD.size + size]

    def publish(self) -> None:
        """Let the reader see all that is written, and wake it where it waits for that."""
        fence()
        self.words[HEAD] = self.position
        fence()
        if self.words[ARMED]:
            self.words[ARMED] = 0
            os.eventfd_write(self.wake, 1)

    def arm(self) -> None:
        """Ask to be woken at the next record; to be called before `records`, so that none is missed."""
        self.words[ARMED] = 1
        fence()

    def woken(self) -> None:
        """Take the wake-up, and ask for the next."""
        with suppress(BlockingIOError):  # it was taken before
            os.eventfd_read(self.wake)
        self.arm()

    def records(self) -> Iterator[memoryview]:
        """What is published and not read yet. A record may be looked at until `release`."""
        head = self.words[HEAD]
        fence()
        while self.position < head:
            place = self.position & (self.capacity - 1)
            size, kind = RECORD.unpack_from(self.places, place)
            if kind == SKIP:
                self.position += self.capacity - place
                continue
            self.position += -(-(RECORD.size + size) // ALIGNMENT) * ALIGNMENT
            yield self.places[place + RECORD.size : place + RECORD.size + size]

    def release(self) -> None:
        """Give the room of all that has been read back to the writer."""
        fence()
        self.words[TAIL] = self.position
