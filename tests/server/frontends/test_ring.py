"""Records through shared memory: what is written is read, in order and unharmed, also by another process."""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.frontends.ring import PREAMBLE, Ring


def ends(capacity: int) -> tuple[Ring, Ring]:
    memory = memoryview(mmap.mmap(-1, PREAMBLE + capacity))
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    return Ring(memory, wake), Ring(memory, wake)


def write(ring: Ring, content: bytes) -> bool:
    room = ring.reserve(len(content))
    if room is None:
        return False
    room[:] = content
    return True


def read(ring: Ring) -> list[bytes]:
    found = [bytes(record) for record in ring.records()]
    ring.release()
    return found


def woken(ring: Ring) -> bool:
    return bool(select.select([ring.wake], [], [], 0)[0])


def test_a_record_is_seen_once_it_is_published():
    writer, reader = ends(4096)
    assert write(writer, b"one")
    assert read(reader) == []
    writer.publish()
    assert read(reader) == [b"one"]
    assert read(reader) == []


def test_what_does_not_fit_is_refused_until_the_reader_gives_room_back():
    writer, reader = ends(1024)
    assert not write(writer, bytes(1024))
    assert write(writer, bytes(900))
    assert not write(writer, bytes(100))
    writer.publish()
    assert list(map(len, reader.records())) == [900]
    assert not write(writer, bytes(100))
    reader.release()
    assert write(writer, bytes(100))


def test_a_reader_is_woken_once_for_many_records_and_only_when_it_asks():
    writer, reader = ends(4096)
    write(writer, b"one")
    writer.publish()
    assert not woken(reader)
    reader.arm()
    assert read(reader) == [b"one"]
    for content in (b"two", b"three"):
        write(writer, content)
        writer.publish()
    assert woken(reader)
    reader.woken()
    assert not woken(reader)
    assert read(reader) == [b"two", b"three"]
    write(writer, b"four")
    writer.publish()
    assert woken(reader)


def test_a_capacity_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        ends(1000)


@given(st.lists(st.one_of(st.binary(max_size=700), st.none()), max_size=60))
def test_records_of_any_length_come_in_order(steps: list[bytes | None]):
    """Steps: a record to write, or None: read all."""
    writer, reader = ends(2048)
    written: list[bytes] = []
    seen: list[bytes] = []
    for step in [*steps, None]:
        if step is not None and write(writer, step):
            written.append(step)
        elif step is None:
            writer.publish()
            seen += read(reader)
    assert seen == written


WRITER = """
import mmap, os, sys, time
from server.frontends.ring import Ring
memory, wake, records = map(int, sys.argv[1:])
ring = Ring(memoryview(mmap.mmap(memory, 0)), wake)
for number in range(records):
    content = number.to_bytes(8, "little") * (1 + number % 50)
    while (room := ring.reserve(len(content))) is None:
        ring.publish()
        time.sleep(0)
    room[:] = content
    if number % 7 == 0:
        ring.publish()
ring.publish()
"""


def test_another_process_is_read_without_loss():
    records = 20_000
    memory, wake = os.memfd_create("ring"), os.eventfd(0, os.EFD_NONBLOCK)
    os.ftruncate(memory, PREAMBLE + 16384)
    reader = Ring(memoryview(mmap.mmap(memory, 0)), wake)
    reader.arm()
    command = [sys.executable, "-c", WRITER, str(memory), str(wake), str(records)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, pass_fds=(memory, wake), cwd=root) as process:
        seen = 0
        while seen < records:
            assert select.select([wake], [], [], 20)[0], f"no wake-up after {seen} records"
            reader.woken()
            for content in read(reader):
                assert content == seen.to_bytes(8, "little") * (1 + seen % 50)
                seen += 1
        assert process.wait(10) == 0
