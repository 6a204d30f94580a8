"""NVIDIA Triton through pytriton: Triton's own HTTP server and dynamic batcher, in front of processes in Python."""

from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.servers.graph import KIND, SETTINGS, run, session


def instance() -> Any:
    model = session()

    @batch
    def infer(input: np.ndarray) -> dict[str, np.ndarray]:
        return {"output": run(model, input)}

    return infer


if __name__ == "__main__":
    port = SETTINGS["port"]
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=port,
        http_thread_count=SETTINGS["http_threads"],
        grpc_port=port + 1,
        allow_grpc=False,
        allow_metrics=False,
        exit_timeout_secs=1,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="model",
            infer_func=[instance() for _ in range(SETTINGS["workers"])],
            inputs=[Tensor(name="input", dtype=KIND.dtype, shape=KIND.shape)],
            outputs=[Tensor(name="output", dtype=np.float32, shape=(2 if KIND.winner else KIND.width,))],
            config=ModelConfig(
                max_batch_size=SETTINGS["batch"],
                batcher=DynamicBatcher(max_queue_delay_microseconds=int(1e3 * SETTINGS["delay_ms"])),
            ),
        )
        triton.serve()
