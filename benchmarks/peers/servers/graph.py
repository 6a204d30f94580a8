"""What every peer is given: the graph in a session, from a request's content to the graph's inputs, and to an answer.

NumPy, ONNX Runtime and the standard library only; of the settings (PEER, JSON) `model`, `graph` and `threads` are read
here, what else there is by the server that it is for.
"""

import json
import os
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

SETTINGS: dict[str, Any] = json.loads(os.environ.get("PEER", "{}"))


class Kind(NamedTuple):
    """The graph's main input, and what is asked of it: the numbers themselves, or only the winner and its
    probability."""

    input: str
    dtype: type
    shape: tuple[int, ...]
    output: str
    width: int
    winner: bool


KINDS = {
    "mlp": Kind("vector", np.float32, (784,), "logits", 10, False),
    "efficientnet-lite0": Kind("pixels", np.uint8, (224, 224, 3), "logits", 1000, True),
    "minilm-l6-v2": Kind("input_ids", np.int64, (-1,), "embedding", 384, False),
}
KIND = KINDS[SETTINGS.get("model", "mlp")]


def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = SETTINGS["threads"]
    # Threads that spin take the cores that the server needs: every peer was faster without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(SETTINGS["graph"], options, providers=["CPUExecutionProvider"])


def run(model: onnxruntime.InferenceSession, batch: np.ndarray, lengths: list[int] | None = None) -> np.ndarray:
    """float32 [rows, width]; of a winner [rows, 2]: its label and its probability. lengths: of padded rows."""
    inputs = {KIND.input: batch}
    if KIND.input == "input_ids":
        mask = np.ones_like(batch)
        for row, length in enumerate(lengths or []):
            mask[row, length:] = 0
        inputs["attention_mask"] = mask
    found: np.ndarray = model.run([KIND.output], inputs)[0]
    if not KIND.winner:
        return found
    label = found.argmax(axis=1)
    exponentials = np.exp(found - found.max(axis=1, keepdims=True))
    probability = exponentials[np.arange(len(found)), label] / exponentials.sum(axis=1)
    return np.stack([label.astype(np.float32), probability], axis=1)


def run_rows(model: onnxruntime.InferenceSession, rows: list[Any]) -> np.ndarray:
    """`run` of rows that came one by one, padded where they are not all as long. rows: lists or arrays."""
    lengths = [len(row) for row in rows]
    if KIND.input != "input_ids" or min(lengths) == max(lengths):
        return run(model, np.asarray(rows, KIND.dtype))
    batch = np.zeros((len(rows), max(lengths)), np.int64)
    for place, row in enumerate(rows):
        batch[place, : len(row)] = row
    return run(model, batch, lengths)


def from_bytes(body: bytes) -> np.ndarray:
    """One row of its raw numbers."""
    return np.frombuffer(body, KIND.dtype).reshape(KIND.shape)
