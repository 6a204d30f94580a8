"""A real server on a real socket, with a home of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from finetune.jobs.store import JobStore
from server.runtime.repository import Repository
from server.serve import Server
from server.settings import Settings


class Live:
    """A running server: its `address`, its `settings`, an HTTP `client` that speaks to it, and what is inside it."""

    def __init__(self, server: Server, settings: Settings) -> None:
        self.server = server
        self.settings = settings
        self.address = server.address()
        self.client = httpx.Client(base_url=self.address, timeout=60)
        state = server.application.state
        self.store: JobStore = state.store
        self.repository: Repository = state.repository

    def upload(self, filename: str, content: bytes, purpose: str = "fine-tune") -> httpx.Response:
        return self.client.post("/v1/files", files={"file": (filename, content)}, data={"purpose": purpose})

    def file_id(self, filename: str, content: bytes) -> str:
        """Id of a file that is uploaded now."""
        response = self.upload(filename, content)
        assert response.status_code == 200, response.text
        found: str = response.json()["id"]
        return found


@contextmanager
def running(settings: Settings) -> Iterator[Live]:
    server = Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server stopped while starting"
        time.sleep(0.01)
    live = Live(server, settings)
    try:
        with live.client:
            yield live
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server does not stop"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that runs no jobs; one a module."""
    with running(Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False)) as server:
        yield server


Start = Callable[..., Live]


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    """OpenAI's own, which asks once."""
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers with settings of the test's own; they stop when it ends."""
    with ExitStack() as running_servers:

        def begin(**settings: Any) -> Live:
            given = {"home": tmp_path, "port": 0, "worker": False, **settings}
            return running_servers.enter_context(running(Settings(**given)))

        yield begin


def until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


SENTIMENTS = b"text,label\n" + b"".join(
    f"{text} {number},{label}\n".encode()
    for number in range(6)
    for text, label in (("a good day", "good"), ("a bad day", "bad"))
)
VECTORS = b"x,y,label\n" + b"".join(
    f"{number / 10},{sign * number},{label}\n".encode()
    for number in range(1, 21)
    for sign, label in ((1, "above"), (-1, "below"))
)


def message_of(response: httpx.Response, status: int) -> str:
    """The message of an error answer, whose status and whole shape are checked on the way."""
    assert response.status_code == status, f"{response.status_code}: {response.text}"
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    message: str = body["error"]["message"]
    return message
