"""One server with a model of every kind, over REST and gRPC."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tritonclient.grpc
import tritonclient.http

from server.settings import Settings
from tests.server.bundles import (
    publish_generator,
    publish_greys,
    publish_heads,
    publish_images,
    publish_series,
    publish_sides,
    publish_texts,
    publish_vectors,
)
from tests.server.conftest import Live, running


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, grpc_port=0, worker=False, poll_seconds=60)
    for publish in (
        publish_generator,
        publish_greys,
        publish_heads,
        publish_images,
        publish_series,
        publish_sides,
        publish_texts,
        publish_vectors,
    ):
        publish(settings.repository)
    with running(settings) as server:
        yield server


@pytest.fixture(scope="package")
def rest(live: Live) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(live.address.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="package")
def calls(live: Live) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    address = f"127.0.0.1:{live.server.application.state.grpc_port}"
    with tritonclient.grpc.InferenceServerClient(address) as client:
        yield client
