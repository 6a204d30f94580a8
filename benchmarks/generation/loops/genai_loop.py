"""onnxruntime-genai's batch generator, greedy, a batch padded on the right: python -m … FOLDER THREADS

Runs in an environment that has onnxruntime-genai, numpy and nothing of ours but the line protocol.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime_genai

from benchmarks.generation.loops.turn import Batch, serve


def main(folder: str, threads: int) -> None:
    config = onnxruntime_genai.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def generate(prompts: list[list[int]], tokens: int) -> Batch:
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), 2, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        params = onnxruntime_genai.GeneratorParams(model)
        most = longest + tokens
        params.set_search_options(batch_size=len(prompts), do_sample=False, min_length=most, max_length=most)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids if len(prompts) > 1 else ids[0])
        batch = Batch()
        for _ in range(tokens):
            generator.generate_next_token()
            batch.step(generator.get_next_tokens().tolist())
        return batch

    serve(f"its batch generator, in process; {threads} threads; batches padded on the right", generate)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
