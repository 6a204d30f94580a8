"""Messages over a Unix socket: whole, in order, with their descriptors, and an end that is noticed."""

from __future__ import annotations

import asyncio
import os
import socket

import msgspec

from server.frontends.control import Control


class Note(msgspec.Struct):
    number: int
    body: bytes = b""


async def pair() -> tuple[Control[Note], Control[Note], list[tuple[Note, list[int]]], list[str]]:
    """Two ends, what the second has received, and which of them has lost the other."""
    received: list[tuple[Note, list[int]]] = []
    lost: list[str] = []
    one, other = socket.socketpair()
    decoder = msgspec.msgpack.Decoder(Note)
    first = Control(one, decoder, lambda note, descriptors: None, lambda: lost.append("first"))
    second = Control(other, decoder, lambda *message: received.append(message), lambda: lost.append("second"))
    return first, second, received, lost


async def until(true: object) -> None:
    assert callable(true)
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it does not come")


async def messages() -> None:
    first, second, received, lost = await pair()
    bodies = [os.urandom(size) for size in (0, 10, 3_000_000, 100, 700_000)]
    for number, body in enumerate(bodies):
        memory = os.memfd_create("one")
        os.write(memory, str(number).encode())
        first.send(Note(number, body), [memory] if number % 2 else [])
    await until(lambda: len(received) == len(bodies))
    assert [note.body for note, _ in received] == bodies
    for number, (_, descriptors) in enumerate(received):
        assert len(descriptors) == number % 2
        for descriptor in descriptors:
            assert os.pread(descriptor, 10, 0) == str(number).encode()
            os.close(descriptor)
    first.close()
    await until(lambda: lost == ["second"])
    second.send(Note(1))  # to nobody


def test_messages_come_whole_and_in_order_with_their_descriptors():
    asyncio.run(messages())


async def waiting_for_a_reader() -> None:
    first, second, received, lost = await pair()
    second.loop.remove_reader(second.end.fileno())
    for number in range(50):
        first.send(Note(number, bytes(100_000)))
    assert len(first.waiting) > 1
    await asyncio.sleep(0)
    second.loop.add_reader(second.end.fileno(), second._readable)
    await until(lambda: len(received) == 50)
    assert [note.number for note, _ in received] == list(range(50))
    second.close()
    await until(lambda: lost == ["first"])


def test_a_slow_reader_holds_up_nobody_and_loses_nothing():
    asyncio.run(waiting_for_a_reader())
