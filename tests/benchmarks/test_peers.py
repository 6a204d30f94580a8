"""The comparison with other servers: what they are sent, what is made of what they say, and its own door."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks.peers import __main__ as door
from benchmarks.peers.contenders import Reply, Winner, contenders, in_words, numbers
from benchmarks.peers.document import Conditions, picture, write
from benchmarks.peers.models import CASES, Case, sample
from benchmarks.peers.results import CEILING, Figure, Store, aims, comparisons, rows
from benchmarks.peers.running import agrees
from benchmarks.peers.wrk import Measured, Request, read, script

BY_NAME = {case.name: case for case in CASES}
PRINTED = """Running 2s test @ http://127.0.0.1:8000
  1 threads and 64 connections
MEASURED {"requests":9000,"microseconds":2000000,"p50":12500,"p99":40000,\
"status":%d,"connect":0,"read":2,"write":0,"timeout":1}
"""


def test_wrks_output_becomes_rate_latency_and_all_errors() -> None:
    assert read(PRINTED % 0) == Measured(rate=4500.0, p50=12.5, p99=40.0, errors=3)
    # Answers with another status are no answers.
    assert read(PRINTED % 1000) == Measured(rate=4000.0, p50=12.5, p99=40.0, errors=1003)
    with pytest.raises(ValueError, match="connection refused"):
        read("unable to connect to 127.0.0.1:8000: connection refused\n")


def test_the_script_sends_path_headers_and_body_as_they_are() -> None:
    text = script(Request('/v1/classify?model="x"', {"content-type": "text/plain"}, b"\0"), Path("/tmp/body"))
    assert 'wrk.path = "/v1/classify?model=\\"x\\""' in text
    assert 'wrk.headers["content-type"] = "text/plain"' in text
    assert "io.open(\"/tmp/body\", 'rb')" in text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_contender_is_sent_the_same_numbers(case: Case, tmp_path: Path) -> None:
    right = numbers(case)
    for contender in contenders(tmp_path):
        if case.model not in contender.settings:
            continue
        request = contender.request(case, contender.settings[case.model])
        if request.headers["content-type"] == "application/json":
            found = json.loads(request.body)
            found = found["inputs"][0]["data"] if "inputs" in found else found["input"]
            given = np.array(found, right.dtype).reshape(right.shape)
        else:
            given = np.frombuffer(request.body[-right.nbytes :], right.dtype).reshape(right.shape)
        np.testing.assert_array_equal(given, right, contender.name)
        if length := request.headers.get("Inference-Header-Content-Length"):
            head = json.loads(request.body[: int(length)])["inputs"][0]
            assert head["shape"] == [1, *right.shape]
            assert head["parameters"]["binary_data_size"] == right.nbytes == len(request.body) - int(length)
        if case.form == "binary":
            assert len(request.body) < right.nbytes + 400, contender.name


def test_answers_are_read_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "efficientnet-lite0" / "1").mkdir(parents=True)
    (tmp_path / "efficientnet-lite0" / "1" / "manifest.json").write_text(json.dumps({"labels": ["cat", "dog"]}))
    logits = np.arange(10, dtype=np.float32)
    plain = json.dumps({"output": logits.tolist()}).encode()
    v2 = json.dumps({"outputs": [{"data": logits.tolist(), "shape": [1, 10]}]}).encode()
    binary = Reply({"inference-header-content-length": "2"}, b"{}" + logits.tobytes())
    by_name = {one.name: one for one in contenders(tmp_path)}
    for name, reply in (
        ("FastAPI", Reply({}, plain)),
        ("LitServe", Reply({}, plain)),
        ("Ray Serve", Reply({}, plain)),
        ("BentoML", Reply({}, plain)),
        ("BentoML", Reply({}, json.dumps([logits.tolist()]).encode())),
        ("MLServer", Reply({}, v2)),
        ("pytriton", Reply({}, v2)),
        ("pytriton", binary),
        ("Espalier v2", binary),
    ):
        answer = by_name[name].answer(BY_NAME["mlp-json"], reply)
        assert isinstance(answer, np.ndarray)
        np.testing.assert_array_equal(answer, logits, name)
    ours = json.dumps({"data": [{"label": "dog", "probability": 0.75}]}).encode()
    assert by_name["Espalier"].answer(BY_NAME["cnn"], Reply({}, ours)) == Winner(1, 0.75)
    theirs = Reply({}, json.dumps({"output": [1.0, 0.75]}).encode())
    assert by_name["FastAPI"].answer(BY_NAME["cnn"], theirs) == Winner(1, 0.75)


def test_a_wrong_answer_is_seen() -> None:
    right = np.array([0.0, np.log(3.0)], np.float32)
    cnn, mlp, text = BY_NAME["cnn"], BY_NAME["mlp-json"], BY_NAME["text-32"]
    assert agrees(cnn, Winner(1, 0.75), right)
    assert not agrees(cnn, Winner(0, 0.75), right)
    assert not agrees(cnn, Winner(1, 0.7), right)
    assert agrees(mlp, right + 1e-5, right)
    assert not agrees(mlp, right + 0.1, right)
    assert not agrees(mlp, right[:1], right)
    # A vector of unit length says the same.
    assert agrees(text, np.array([0.0, 1.0]), right)
    assert not agrees(text, np.array([0.1, 1.0]), right)


def figure(contender: str, rate: float, round_: int, case: str = "mlp-json", connections: int = 64) -> Figure:
    measured = Measured(rate=rate, p50=2.0, p99=5.0, errors=int(contender == "Ray Serve"))
    count = 0 if contender == CEILING else connections
    return Figure(contender=contender, case=case, connections=count, round=round_, measured=measured, cpu=100.0)


def some_figures() -> list[Figure]:
    """In the second round the machine was slow, for everybody."""
    made = []
    for round_, speed in enumerate((1.0, 0.25, 1.0)):
        made.append(figure(CEILING, 40_000 * speed, round_))
        for contender, rate in (
            ("Espalier", 8_000),
            ("Espalier v2", 7_000),
            ("pytriton", 2_000),
            ("FastAPI", 1_900),
            ("Ray Serve", 500),
        ):
            made.append(figure(contender, rate * speed, round_))
    # Peers that were measured in one round only, in which we were slower than usual.
    made += [figure("Espalier", 30, 0, "cnn", 256), figure("FastAPI", 40, 0, "cnn", 256)]
    return [*made, figure(CEILING, 50, 0, "cnn")]


def test_ratios_are_those_of_the_same_round() -> None:
    found = {(one.case, one.connections): one for one in comparisons(some_figures())}
    one = found["mlp-json", 64]
    assert (one.ours.contender, one.peer and one.peer.contender) == ("Espalier", "pytriton")
    assert one.ratio == pytest.approx(4.0)
    assert one.ours.ceiling == pytest.approx(0.2)
    assert one.ours.rate == 8_000
    assert found["cnn", 256].ratio == pytest.approx(0.75)
    by_words = {aim.words: aim for aim in aims(list(found.values()))}
    assert by_words["MLP, JSON, 64 connections: times the best peer"].met
    assert not by_words["more requests a second than every peer, at every request and concurrency"].met
    assert by_words["p99 over the median, at worst"].found.startswith("2.5")
    assert "MLP, binary, 64 connections: times the best peer" not in by_words, "it was not measured"
    errors = {row.contender: row.errors for row in rows(some_figures()) if row.case == "mlp-json"}
    assert errors["Ray Serve"] == 3


def test_what_one_server_alone_did_is_compared_with_nobody() -> None:
    alone = [one for one in some_figures() if one.contender in ("Espalier", CEILING)]
    assert all(one.peer is None and one.ratio is None for one in comparisons(alone))
    peers = [one for one in some_figures() if not one.contender.startswith("Espalier")]
    assert comparisons(peers) == []


def test_the_document_shows_ratios_failures_and_who_is_missing(tmp_path: Path) -> None:
    figures = some_figures()
    run = Conditions(
        cores=2, memory_gib=24, processor="a processor", minutes=20, rounds=3, generator="wrk",
        settings={one.name: in_words(one) for one in contenders(tmp_path)}, versions={"LitServe": "0.2.19"},
        missing={"BentoML": "it cannot be installed here"}, ceilings={"mlp-json": "40,000 samples/s"},
    )  # fmt: skip
    text = write(figures, run)
    assert "| MLP, JSON | 64 | **8,000** | 2,000 | pytriton | **4.00** | 0.20 | 2.5 |" in text
    assert "| Ray Serve | 500 (2 / 5, 3 failed) | 0.01 | 100 |" in text
    assert "| **Espalier** | **8,000** (2 / 5) | 0.20 | 100 |" in text
    assert "BentoML: it cannot be installed here" in text
    assert picture(figures).content.startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_where_its_conditions_are_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open("Espalier v2", {"code": "1"})
    store.add(figure("Espalier v2", 10, 0))
    again = Store(tmp_path)
    again.open("Espalier v2", {"code": "1"})
    assert again.has("Espalier v2", "mlp-json", 64, 0)
    assert not again.has("Espalier v2", "mlp-json", 64, 1)
    assert again.figures() == store.figures()
    other = Store(tmp_path)
    other.open("Espalier v2", {"code": "2"})
    assert not other.has("Espalier v2", "mlp-json", 64, 0)
    again.clear()
    assert list(tmp_path.iterdir()) == []


def test_slow_networks_are_measured_longer_and_once() -> None:
    plan = door.Plan(cases=CASES, connections=(1, 64, 256), rounds=3)
    text = BY_NAME["text-128"]
    assert [plan.seconds(count, 40.0) for count in (1, 64, 256)] == [1, 3, 8]
    assert plan.wanted(text, 40.0, 0) == [1, 64, 256]
    assert plan.wanted(text, 40.0, 1) == [1, 64]
    assert plan.wanted(BY_NAME["mlp-json"], 40_000.0, 2) == [1, 64, 256]


def test_samples_are_the_same_every_time() -> None:
    for case in CASES:
        for first, second in zip(sample(case, 2).values(), sample(case, 2).values(), strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_its_own_door_measures_us_and_fastapi(tmp_path: Path) -> None:
    # What earlier runs have installed and exported is used where it is; it costs a minute where it is not.
    for name in ("fastapi", "models", "wrk"):
        if (door.KEPT / name).is_dir():
            shutil.copytree(door.KEPT / name, tmp_path / name, symlinks=True)
    output = tmp_path / "figures.json"
    flags = [
        "--quick",
        "--only",
        "Espalier,FastAPI",
        "--models",
        "mlp",
        "--envs",
        str(tmp_path),
        "--output",
        str(output),
    ]
    environment = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *flags], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = msgspec.json.decode(output.read_bytes())
    places = {(row["contender"], row["case"], row["connections"]) for row in found["rows"]}
    cases, counts = ("mlp-json", "mlp-binary"), (1, 64)
    assert places == {(name, case, count) for name in ("Espalier", "FastAPI") for case in cases for count in counts}
    assert all(row["rate"] > 0 and row["errors"] == 0 and 0 < row["ceiling"] < 1 for row in found["rows"])
    assert "times the best peer" in done.stdout
