"""Four times the load: a real server whose session takes a known time for a row."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.overload import DEADLINE_SECONDS, measure
from benchmarks.serving import request
from server.runtime.batcher import Block, Value, Wanted
from server.settings import Settings
from tests.server.bundles import publish_vectors
from tests.server.conftest import running

ROW_SECONDS = 0.005


@pytest.mark.slow
def test_goodput_stays_what_is_accepted_is_in_time_and_the_rest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.runtime.model.INLINE_SECONDS", 0.0)
    settings = Settings(home=tmp_path, port=0, worker=False, parallel_runs=1)
    publish_vectors(settings.repository)
    head = request("/v1/classify", "application/json", body := b'{"model": "points", "input": [0, 1]}')
    message = head.replace(b"\r\n\r\n", b"\r\nx-request-timeout: %g\r\n\r\n" % DEADLINE_SECONDS)
    assert message.endswith(body)
    with running(settings) as live:
        batcher = live.repository.get("points").batcher
        assert batcher is not None
        run = batcher.run

        def slow(blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
            time.sleep(ROW_SECONDS * sum(map(len, blocks)))
            return run(blocks, wanted)

        monkeypatch.setattr(batcher, "run", slow)
        monkeypatch.setattr(batcher, "run_alone", None)
        port = int(live.address.rpartition(":")[2])
        found = measure(os.getpid(), port, message, seconds=4.0)
        rejected = live.server.application.state.metrics.rejected
        assert batcher.idle()
    assert found["unanswered"] == 0
    assert found["answers"].keys() <= {200, 408, 429}, found["answers"]
    assert found["answers"][429] > found["answers"][200]
    assert rejected["points", "overload"] >= found["answers"][429]
    # A machine that has much else to do may miss a little of this.
    assert found["ratio"] > 0.8, found
    assert found["late"] <= 0.05 * found["answers"][200], found
