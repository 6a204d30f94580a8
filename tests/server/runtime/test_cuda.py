"""The same on a GPU, where there is one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.runtime.placement import Placement
from server.runtime.session import CPU, CUDA, Session, cuda_driver
from tests.server.bundles import publish_images, publish_texts, publish_vectors

pytestmark = pytest.mark.skipif(not cuda_driver(), reason="no NVIDIA driver here")


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("publish", [publish_vectors, publish_images, publish_texts])
def test_the_gpu_answers_as_the_cpu_does(tmp_path: Path, publish: Any, captured: bool) -> None:
    manifest = publish(tmp_path)
    path = tmp_path / manifest.name / "1" / "model.onnx"
    even = publish is not publish_texts
    plain = Session(path, Placement(providers=(CPU,)))
    device = Session(path, Placement(providers=(CUDA,), even=even, tuned=publish is publish_images, captured=captured))
    assert device.provider == CUDA
    random = np.random.default_rng(0)

    def sample(rows: int) -> dict[str, np.ndarray]:
        if publish is publish_vectors:
            return {"vector": random.normal(size=(rows, 2)).astype(np.float32)}
        if publish is publish_images:
            return {"pixels": random.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)}
        ids = random.integers(0, 3, (rows, 1 + rows % 7))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    device.warm_up(sample, ["logits"])
    wrong: list[float] = []

    def ask() -> None:
        for rows in (1, 2, 3, 17, 64, 5, 1):
            given = sample(rows)
            found, right = device.run(given, ["logits"])[0], plain.run(given, ["logits"])[0]
            wrong.append(float(np.abs(found - right).max()) / max(1.0, float(np.abs(right).max())))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 28
    assert max(wrong) < 1e-2  # TF32 has ten bits
