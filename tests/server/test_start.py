"""The serving process: what it imports, how soon it is ready, how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import Settings
from tests.server.bundles import publish_images, publish_texts, publish_vectors

SERVE_AND_LOOK = """
import json, sys, threading, time, urllib.request
from pathlib import Path
from server.process import age_seconds, resident_bytes
from server.serve import Server
from server.settings import Settings

server = Server(Settings(home=Path(sys.argv[1]), port=0, worker=False))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    assert thread.is_alive()
    time.sleep(0.005)
ready, resident = age_seconds(), resident_bytes()

def post(path, body):
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(server.address() + path, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))

answers = []
for model, given in json.loads(sys.argv[2]):
    answers.append(post("/v1/classify", {"model": model, "input": given})["data"][0]["label"])
for path in ("/metrics", "/openapi.json", "/docs", "/v1/models", "/v1/files", "/v1/fine_tuning/jobs"):
    assert urllib.request.urlopen(server.address() + path).status == 200
server.should_exit = True
thread.join()
print(json.dumps({"ready": ready, "resident": resident, "answers": answers, "modules": list(sys.modules)}))
"""


def look(home: Path, questions: list[tuple[str, object]]) -> dict[str, object]:
    command = [sys.executable, "-c", SERVE_AND_LOOK, str(home), json.dumps(questions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_serving_never_imports_what_training_needs(tmp_path: Path) -> None:
    for publish in (publish_vectors, publish_images, publish_texts):
        publish(Settings(home=tmp_path).repository)
    found = look(tmp_path, [("points", [0, 1]), ("days", "good day")])
    assert found["answers"] == ["above", "good"]
    modules = found["modules"]
    assert isinstance(modules, list)
    assert "onnxruntime" in modules
    assert not {"torch", "transformers", "accelerate", "matplotlib", "onnx", "sklearn"} & set(modules)


def test_an_empty_server_is_small_and_soon_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look(tmp_path, [])  # the database is made and byte code compiled
    found = look(tmp_path, [])
    with capsys.disabled():
        print(f"\nready in {found['ready']:.2f} s, {found['resident'] / 1e6:.0f} MB resident before models")  # type: ignore[operator, str-format]
    assert isinstance(found["resident"], int)
    assert found["resident"] < 200e6
