"""Messages between the inference process and a front-end that are too rare or too large for the rings: msgpack over a
Unix socket, file descriptors with them. Neither side ever waits for the other.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec

FRAME = struct.Struct("<II")  # bytes of the message, and descriptors that come with it
READ_BYTES = 256 * 1024
# Linux takes no more of them in one call.
MOST_DESCRIPTORS = 253

M = TypeVar("M")


class Control(Generic[M]):
    """One end. To be made on the event loop."""

    def __init__(
        self,
        end: socket.socket,
        decoder: msgspec.msgpack.Decoder[M],
        received: Callable[[M, list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        """received: is given every message, and its descriptors, which are its own from then on. lost: is called once
        when the other end is gone."""
        end.setblocking(False)
        self.end, self.decoder, self.received, self.lost = end, decoder, received, lost
        self.encoder = msgspec.msgpack.Encoder()
        self.loop = asyncio.get_running_loop()
        self.open = True
        self.read = bytearray()
        self.read_descriptors: deque[int] = deque()
        self.waiting: deque[tuple[memoryview, Sequence[int]]] = deque()
        self.loop.add_reader(end.fileno(), self._readable)

    def send(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Send it as soon as the socket takes it. Its descriptors are closed then. Nothing is sent to who is gone."""
        if not self.open:
            close(descriptors)
            return
        body = self.encoder.encode(message)
        self.waiting.append((memoryview(FRAME.pack(len(body), len(descriptors)) + body), descriptors))
        if len(self.waiting) == 1:
            self._write()

    async def sent(self) -> None:
        """Wait until all is sent, or the other end is gone."""
        while self.open and self.waiting:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.01)

    def close(self) -> None:
        if not self.open:
            return
        self.open = False
        self.loop.remove_reader(self.end.fileno())
        self.loop.remove_writer(self.end.fileno())
        self.end.close()
        close(self.read_descriptors)
        for _, descriptors in self.waiting:
            close(descriptors)
        self.waiting.clear()

    def _write(self) -> None:
        while self.waiting:
            content, descriptors = self.waiting[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                sent = self.end.sendmsg([content], ancillary)
            except BlockingIOError:
                self.loop.add_writer(self.end.fileno(), self._writable)
                return
            except OSError:
                return  # the reader notices that the other end is gone
            close(descriptors)
            self.waiting[0] = content[sent:], ()
            if sent == len(content):
                self.waiting.popleft()

    def _writable(self) -> None:
        self.loop.remove_writer(self.end.fileno())
        self._write()

    def _readable(self) -> None:
        try:
            content, descriptors, _, _ = socket.recv_fds(self.end, READ_BYTES, MOST_DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            content, descriptors = b"", []
        if not content:
            self.close()
            self.lost()
            return
        self.read += content
        self.read_descriptors.extend(descriptors)
        while self.open and len(self.read) >= FRAME.size:
            size, count = FRAME.unpack_from(self.read)
            if len(self.read) < FRAME.size + size:
                return
            body = bytes(memoryview(self.read)[FRAME.size : FRAME.size + size])
            del self.read[: FRAME.size + size]
            self.received(self.decoder.decode(body), [self.read_descriptors.popleft() for _ in range(count)])


def close(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
