"""What a server no longer needs goes at once: a retired model, and the memory that it had."""

from __future__ import annotations

import gc
import json
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.bundle import Manifest
from tests.server.bundles import publish_images, publish_texts, publish_vectors
from tests.server.conftest import Live, Start


@pytest.mark.parametrize(
    ("publish", "input"),
    [(publish_vectors, [1.0, 2.0]), (publish_texts, "good day"), (publish_images, None)],
    ids=["vectors", "texts", "images"],
)
def test_a_retired_model_goes_without_the_garbage_collector_and_while_its_last_client_is_connected(
    start: Start, tmp_path: Path, publish: Callable[[Path], Manifest], input: object
) -> None:
    name = publish(tmp_path / "repository").name
    live = start(poll_seconds=0.05)
    if input is None:
        answer = live.client.post(
            f"/v1/classify?model={name}", content=bytes(192), headers={"content-type": "application/octet-stream"}
        )
    else:
        answer = live.client.post("/v1/classify", json={"model": name, "input": input})
    assert answer.status_code == 200, answer.text
    with gone_when_swapped(live, name, lambda: publish(tmp_path / "repository")):
        pass


def test_a_retired_model_goes_when_its_clients_have_gone_without_an_answer(start: Start, tmp_path: Path) -> None:
    name = publish_vectors(tmp_path / "repository").name
    live = start(poll_seconds=0.05)
    body = json.dumps({"model": name, "input": [[1.0, 2.0]] * 300}).encode()
    head = b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with gone_when_swapped(live, name, lambda: publish_vectors(tmp_path / "repository")):
        for i in range(40):
            with socket.create_connection(("127.0.0.1", int(live.address.rpartition(":")[2]))) as client:
                # Closed at once, with a reset.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(head % len(body) + body)
                time.sleep(0.0005 * (i % 4))


@contextmanager
def gone_when_swapped(live: Live, name: str, swap: Callable[[], object]) -> Iterator[None]:
    """That the model of the start is no more soon after another version has taken its place, whatever was asked
    inside."""
    gc.collect()
    gc.disable()
    try:
        # It was there at the start, so that the collector would never look at it.
        model = weakref.ref(live.repository.get(name))
        yield
        swap()
        until = time.monotonic() + 10
        while model() is not None and time.monotonic() < until:
            time.sleep(0.02)
        assert live.repository.get(name).version == 2
        assert model() is None, "somebody holds it"
    finally:
        gc.enable()


HELD = """
import numpy as np
from server import heap
from server.process import resident_bytes

{before}
held = []
for _ in range(2):
    large = []
    for _ in range(40):
        large.append(np.ones({numbers}, np.float32))
        held.append(bytes(2000))  # what stays, between them
    del large
before = resident_bytes()
{after}
print(before // 2**20, resident_bytes() // 2**20)
"""


def held(before: str, after: str, numbers: int) -> tuple[int, int]:
    """MiB that are resident when large blocks were freed, and after what is done then."""
    code = HELD.format(before=before, after=after, numbers=numbers)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    return first, second


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_large_blocks_go_back_when_they_are_freed() -> None:
    plain, _ = held("", "", 2 * 2**20)
    settled, _ = held("heap.settle()", "", 2 * 2**20)
    assert settled < plain - 150, "40 blocks of 8 MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_the_rest_goes_back_when_it_is_said() -> None:
    before, after = held("heap.settle()", "heap.trim()", 2**19)
    assert after < before - 40, "40 blocks of 2 MiB"
