"""The memory that one front-end and the inference process share: two rings, flags, and a slab of rows."""

from __future__ import annotations

import mmap
import os

from server.frontends.ring import PREAMBLE

CALLS_BYTES = PREAMBLE + 2**19
ANSWERS_BYTES = PREAMBLE + 2**23
# Calls in flight that can say that their clients have gone; more than these cannot.
FLAGS = 2**13
# Only what is used takes memory.
SLAB_BYTES = 2**27
BYTES = CALLS_BYTES + ANSWERS_BYTES + FLAGS + SLAB_BYTES


class Region:
    """Its parts, as one process sees them. calls: from the front-end; answers: to it. gone: a byte a call."""

    def __init__(self, descriptor: int) -> None:
        memory = memoryview(mmap.mmap(descriptor, BYTES))
        self.calls, memory = memory[:CALLS_BYTES], memory[CALLS_BYTES:]
        self.answers, memory = memory[:ANSWERS_BYTES], memory[ANSWERS_BYTES:]
        self.gone, self.slab = memory[:FLAGS], memory[FLAGS:]


def shared(name: str, size: int) -> int:
    """A descriptor of so many bytes that processes can share."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def whole(descriptor: int) -> memoryview:
    """What another process has sent in memory of its own. Closes the descriptor."""
    memory = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    return memoryview(memory)
