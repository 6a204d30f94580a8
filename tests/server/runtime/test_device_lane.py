"""The path of a GPU, with sessions created on the CPU: what goes in and out of the lanes, and what they keep."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from server.runtime import session as sessions
from server.runtime.cuda_runtime import CudaError
from server.runtime.deployment import Deployment
from server.runtime.device_lane import RECORDING_RUNS, Gate, Lane
from server.runtime.placement import Placement, placement
from server.runtime.session import CPU, CUDA, TENSORRT, Session, device_providers
from server.settings import Settings
from tests.server.bundles import publish_images, publish_texts, publish_vectors
from tests.server.conftest import Start
from tests.server.runtime.host_device import HostLibrary, opener, runtime


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> HostLibrary:
    found = HostLibrary(devices=2)
    monkeypatch.setattr(sessions, "open_on_device", opener(found))
    return found


def graph(tmp_path: Path, publish: Any = publish_vectors) -> Path:
    manifest = publish(tmp_path)
    return tmp_path / manifest.name / str(manifest.version) / "model.onnx"


def on_device(path: Path, **placed: Any) -> Session:
    return Session(path, Placement(providers=(CUDA,), **placed))


def points(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 2)).astype(np.float32)


@pytest.mark.parametrize("placed", [{}, {"even": True, "tuned": True}, {"even": True, "captured": True}])
def test_batches_of_every_size_are_answered_as_on_the_cpu(
    tmp_path: Path, library: HostLibrary, placed: dict[str, bool]
) -> None:
    path = graph(tmp_path)
    plain = Session(path, Placement(providers=(CPU,)))
    device = on_device(path, parallel=1, **placed)
    assert device.on_device
    assert not plain.on_device
    for rows in (1, 3, 2, 64, 5, 700, 1):  # growing and shrinking, in and above the sizes that are filled up
        given = {"vector": points(rows, rows)}
        for found, right in zip(
            device.run(given, ["embedding", "logits"]), plain.run(given, ["embedding", "logits"]), strict=True
        ):
            np.testing.assert_array_equal(found, right)


def test_parts_are_put_together_and_one_copy_goes_each_way(tmp_path: Path, library: HostLibrary) -> None:
    device = on_device(graph(tmp_path), parallel=1)
    whole = points(6)
    (apart,) = device.run({"vector": [whole[:1], whole[1:4], whole[4:]]}, ["logits"])
    (together,) = device.run({"vector": whole}, ["logits"])
    np.testing.assert_array_equal(apart, together)
    lane = device.lanes.get()
    assert lane.copies == 4  # of two batches, each in by one and out by one


def test_an_answer_stays_what_it_was_when_the_next_batch_runs(tmp_path: Path, library: HostLibrary) -> None:
    device = on_device(graph(tmp_path), parallel=1)
    (first,) = device.run({"vector": points(4, 1)}, ["logits"])
    kept = first.copy()
    device.run({"vector": points(4, 2)}, ["logits"])
    np.testing.assert_array_equal(first, kept)


def test_texts_of_many_lengths(tmp_path: Path, library: HostLibrary) -> None:
    path = graph(tmp_path, publish_texts)
    plain, device = Session(path, Placement(providers=(CPU,))), on_device(path, parallel=1)
    for length in (3, 1, 8, 300, 2):
        ids = np.random.default_rng(length).integers(0, 3, (2, length))
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        np.testing.assert_allclose(
            device.run(given, ["logits"])[0], plain.run(given, ["logits"])[0], rtol=1e-5, atol=1e-6
        )


def test_instances_on_several_devices_run_side_by_side(tmp_path: Path, library: HostLibrary) -> None:
    device = on_device(graph(tmp_path), parallel=2, devices=(0, 1))
    assert device.parallel == 4
    lanes = [device.lanes.get() for _ in range(4)]
    assert sorted(lane.device for lane in lanes) == [0, 0, 1, 1]
    assert len({lane.stream for lane in lanes}) == 4
    for lane in lanes:
        device.lanes.put(lane)
    right = Session(graph(tmp_path, publish_vectors), Placement(providers=(CPU,)))
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for step in range(20):
            given = {"vector": points(1 + (seed + step) % 9, seed * 100 + step)}
            if not np.array_equal(device.run(given, ["logits"])[0], right.run(given, ["logits"])[0]):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_goes_back_with_the_session(tmp_path: Path, library: HostLibrary) -> None:
    device = on_device(graph(tmp_path), parallel=2)
    for rows in (1, 50, 3):
        device.run({"vector": points(rows)}, ["logits"])
    assert library.device
    assert library.host
    assert len(library.streams) == 2
    del device
    gc.collect()
    assert not library.device
    assert not library.host
    assert not library.streams


def test_a_device_that_is_not_there_leaves_the_cpu(
    tmp_path: Path, library: HostLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    device = on_device(graph(tmp_path), devices=(0, 7))
    assert not device.on_device
    assert device.provider == CPU
    assert "device 7" in caplog.text
    assert "invalid device ordinal" in caplog.text
    assert device.run({"vector": points(2)}, ["logits"])[0].shape == (2, 2)


def test_errors_of_the_library_have_their_words() -> None:
    with pytest.raises(CudaError, match="cudaSetDevice: invalid device ordinal"):
        runtime(HostLibrary(devices=1)).use(1)


class Recorder:
    """A session that notes how it is asked to record, and fails where it is told to."""

    def __init__(self, inner: onnxruntime.InferenceSession, fails_at: int | None = None) -> None:
        self.inner, self.fails_at = inner, fails_at
        self.numbers: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        self.numbers.append(number)
        if self.fails_at is not None and number != "-1" and self.numbers.count(number) == self.fails_at:
            raise RuntimeError("a kernel that cannot be recorded")
        self.inner.run_with_iobinding(binding, options)


def captured_lane(
    tmp_path: Path, library: HostLibrary, size: int = 4, fails_at: int | None = None
) -> tuple[Lane, Recorder]:
    inner = onnxruntime.InferenceSession(str(graph(tmp_path)), providers=[CPU])
    recorder, made = Recorder(inner, fails_at), runtime(library)
    lane = Lane(
        recorder,  # type: ignore[arg-type]
        made,
        device_name="cpu",
        device=0,
        stream=made.stream(),
        size=size,
        captured=True,
    )
    return lane, recorder


def test_a_graph_is_recorded_once_for_what_is_asked_and_its_memory_stays(tmp_path: Path, library: HostLibrary) -> None:
    lane, recorder = captured_lane(tmp_path, library)
    lane.warm_up(lambda rows: {"vector": points(rows)}, ["logits"])
    assert recorder.numbers == ["0"] * RECORDING_RUNS
    addresses = {name: buffer.device for name, buffer in lane.buffers.items()}
    recorder.numbers.clear()
    for rows in (1, 2, 3, 4):
        lane.run({"vector": [points(rows)]}, ["logits"])
    for rows in (4, 1):
        lane.run({"vector": [points(rows)]}, ["embedding", "logits"])  # these outputs are another graph
    assert recorder.numbers == ["0"] * 4 + ["1"] * 2
    assert {name: lane.buffers[name].device for name in addresses} == addresses


def test_what_cannot_be_recorded_runs_all_the_same(
    tmp_path: Path, library: HostLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    lane, recorder = captured_lane(tmp_path, library, fails_at=RECORDING_RUNS)
    right = Session(graph(tmp_path), Placement(providers=(CPU,)))
    for step in range(6):
        given = points(2, step)
        (found,) = lane.run({"vector": [given]}, ["logits"])
        np.testing.assert_array_equal(found, right.run({"vector": given}, ["logits"])[0])
    assert recorder.numbers[-2:] == ["-1", "-1"]
    assert "not captured" in caplog.text


def test_larger_batches_than_were_recorded_move_the_memory_and_end_the_recordings(
    tmp_path: Path, library: HostLibrary
) -> None:
    lane, recorder = captured_lane(tmp_path, library)
    lane.warm_up(lambda rows: {"vector": points(rows)}, ["logits"])
    lane.run({"vector": [points(40)]}, ["logits"])
    recorder.numbers.clear()
    lane.run({"vector": [points(4)]}, ["logits"])
    assert recorder.numbers == ["-1"], "a recording is replayed whose memory is gone"


def test_each_size_has_a_session_and_what_is_captured_a_thread(
    tmp_path: Path, library: HostLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[tuple[int, int]]] = {}
    run = Lane.run

    def noted(lane: Lane, inputs: Any, outputs: Any) -> Any:
        assert lane.size is not None
        rows = sum(map(len, inputs["vector"]))
        seen.setdefault(lane.size, set()).add((rows, threading.get_ident()))
        return run(lane, inputs, outputs)

    monkeypatch.setattr(Lane, "run", noted)
    device = on_device(graph(tmp_path), parallel=1, even=True, captured=True, most=12)
    device.warm_up(lambda rows: {"vector": points(rows)}, ["logits"])
    for rows in (1, 3, 7, 9, 12, 2):
        device.run({"vector": points(rows)}, ["logits"])
    assert {size: {rows for rows, _ in runs} for size, runs in seen.items()} == {
        1: {1}, 2: {2}, 4: {3, 4}, 8: {7, 8}, 12: {9, 12}
    }  # fmt: skip
    threads = {thread for runs in seen.values() for _, thread in runs}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_while_one_records_nobody_else_is_inside() -> None:
    gate, inside, worst = Gate(), [0], [0]

    def share() -> None:
        for _ in range(200):
            with gate.shared():
                inside[0] += 1
                time.sleep(0)
                inside[0] -= 1

    def alone() -> None:
        for _ in range(20):
            with gate.exclusive():
                worst[0] = max(worst[0], inside[0])
                time.sleep(0.0005)

    threads = [threading.Thread(target=share) for _ in range(4)] + [threading.Thread(target=alone) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert worst == [0]


def test_what_the_providers_are_told() -> None:
    placed = Placement(providers=(TENSORRT, CUDA, CPU), engines=Path("/home/engines"), captured=True, even=True)
    (tensorrt, engine), (cuda, options), cpu = device_providers(placed, 3, 4711, captured=True)
    assert (tensorrt, cuda, cpu) == (TENSORRT, CUDA, CPU)
    assert options["device_id"] == engine["device_id"] == "3"
    assert options["user_compute_stream"] == engine["user_compute_stream"] == "4711"
    assert options["enable_cuda_graph"] == engine["trt_cuda_graph_enable"] == "1"
    assert engine["trt_engine_cache_path"] == "/home/engines"
    assert [name for name, _ in device_providers(Placement(), 0, 1, captured=False)[:-1]] == [CUDA]


def test_a_deployment_says_where_a_model_runs(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, providers=[CUDA], intra_op_threads=2)
    manifest = publish_images(tmp_path)
    placed = placement(settings, Deployment(instances=3, devices=[1], cuda_graphs=True), manifest)
    assert placed == Placement(
        providers=(CUDA,),
        parallel=3,
        threads=2,
        devices=(1,),
        captured=True,
        engines=tmp_path / "tensorrt" / manifest.name / "1",
        even=True,
        tuned=True,
    )
    texts = placement(settings, Deployment(cuda_graphs=True, tensorrt=True), publish_texts(tmp_path))
    assert not texts.even
    assert texts.tensorrt


def test_a_server_answers_from_the_device(tmp_path: Path, library: HostLibrary, start: Start) -> None:
    repository = tmp_path / "repository"
    for publish in (publish_vectors, publish_images, publish_texts):
        publish(repository)
    live = start(providers=[CUDA])
    assert library.streams
    answers = live.client.post("/v1/classify", json={"model": "points", "input": [[0, 3], [0, -3], [1, 1]]}).json()
    assert [row["label"] for row in answers["data"]] == ["above", "below", "above"]
    texts = live.client.post("/v1/classify", json={"model": "days", "input": ["good day", "bad day"]}).json()
    assert [row["label"] for row in texts["data"]] == ["good", "bad"]
    shades = live.client.post(
        "/v1/classify?model=shades",
        content=np.full((2, 8, 8, 3), 250, np.uint8).tobytes(),
        headers={"content-type": "application/octet-stream"},
    ).json()
    assert [row["label"] for row in shades["data"]] == ["light", "light"]
    assert len(library.device) >= 3
