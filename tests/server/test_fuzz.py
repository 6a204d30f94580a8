"""Whatever schemathesis makes of the API's own description, the answer is never a 5xx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import Settings
from tests.server.bundles import (
    publish_generator,
    publish_greys,
    publish_halves,
    publish_heads,
    publish_images,
    publish_moods,
    publish_sums,
    publish_texts,
    publish_vectors,
)
from tests.server.chains import publish_language_model, publish_letters, publish_translation
from tests.server.conftest import Live, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False)
    publish_vectors(settings.repository)
    publish_images(settings.repository)
    publish_texts(settings.repository)
    publish_generator(settings.repository)
    publish_moods(settings.repository)
    publish_sums(settings.repository)
    publish_heads(settings.repository)
    publish_halves(settings.repository)
    publish_greys(settings.repository)
    publish_translation(settings.repository)
    publish_language_model(settings.repository)
    publish_letters(settings.repository, "smollm2")  # as the description's examples call it
    with running(settings) as server:
        yield server


def test_no_request_breaks_the_server(live: Live) -> None:
    schemathesis = Path(sys.executable).with_name("schemathesis")
    command = [str(schemathesis), "run", f"{live.address}/openapi.json", "--checks", "not_a_server_error"]
    options = ["--max-examples", "25", "--phases", "examples,coverage,fuzzing", "--seed", "1", "--max-failures", "5"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert live.client.get("/health/ready").status_code == 200
