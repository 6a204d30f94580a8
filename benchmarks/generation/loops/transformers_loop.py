"""transformers' generate, float32, greedy, a batch padded on the left: python -m … FOLDER THREADS [lookup]

The faster of its dynamic and its static cache, tried at the beginning. lookup: instead, one prompt at a time, with its
prompt lookup, which guesses tokens by what followed the last ones before.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.generation.loops.turn import Batch, serve

TRIAL = 12
# transformers' documentation's example.
GUESSED = 10


class Steps(BaseStreamer):  # type: ignore[misc]
    """Told the prompts first, then the tokens of every step."""

    def __init__(self) -> None:
        self.batch = Batch()
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        if self.begun and value.dim() == 1:
            self.batch.step(value.tolist())
        elif self.begun:  # several of the only sequence
            for token in value[0].tolist():
                self.batch.step([token])
        self.begun = True

    def end(self) -> None:
        pass


def main(folder: str, threads: int, lookup: bool) -> None:
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    padding = model.config.pad_token_id

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int, cache: str | None = None) -> Batch:
        longest = max(map(len, prompts))
        ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        steps = Steps()
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=padding,
            cache_implementation=cache,
            prompt_lookup_num_tokens=GUESSED if lookup else None,
            streamer=steps,
        )
        return steps.batch

    if lookup:
        serve(f"prompt_lookup_num_tokens={GUESSED}; {threads} threads", generate)
        return
    times = {}
    for cache in (None, "static"):
        generate([list(range(50, 70))], 2, cache)
        start = time.perf_counter()
        generate([list(range(50, 70))], TRIAL, cache)
        times[cache] = time.perf_counter() - start
    best = min(times, key=lambda cache: times[cache])
    settings = f"sdpa, {best or 'dynamic'} cache, the faster of both; {threads} threads; batches padded on the left"
    serve(settings, lambda prompts, tokens: generate(prompts, tokens, best))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "lookup" in sys.argv[3:])
