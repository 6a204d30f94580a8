"""Streams started and dropped at random: python -m benchmarks.generation_soak [--streams 500]

SmolLM2-135M-Instruct over HTTP. Some streams are read to their end, some are dropped after a few events, some at any
moment, before they have begun too. Afterwards every slot must have come back, no stream may have got a word that its
prompt does not lead to when it is alone, and memory must be flat. Says what was wrong, with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

# Memory is looked at after every one of so many parts.
PARTS = 5
SETTLED_SECONDS = 30.0


@dataclass
class Soak:
    """What is done, and what came of it.

    slots: of the server. together: streams that are open at once. alone: what follows each prompt. seconds: that one
    takes alone. endings: how streams ended, as the client saw it. memory: resident bytes of the server, after each
    part. problems: in words; empty when all is well.
    """

    address: str
    model: str
    prompts: Sequence[str]
    slots: int
    tokens: int
    streams: int = 500
    together: int = 24
    seed: int = 0
    alone: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    endings: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def body(self, prompt: str, tokens: int) -> dict[str, object]:
        fixed = {"model": self.model, "stream": True, "temperature": 0}
        return {**fixed, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens}


async def soak(run: Soak, most_growth: int) -> None:
    """Do it. most_growth: bytes that the server may have more after the last part than after the first two."""
    limits = httpx.Limits(max_connections=run.together + run.slots + 2)
    async with httpx.AsyncClient(base_url=run.address, timeout=120, limits=limits) as client:
        begun = time.monotonic()
        for prompt in run.prompts:
            said: list[str] = []
            await stream(client, run.body(prompt, run.tokens), said, None)
            run.alone[prompt] = "".join(said)
        run.seconds = (time.monotonic() - begun) / len(run.prompts)
        if len(set(run.alone.values())) < len(run.prompts):
            run.problems.append("two prompts are continued alike: nothing could be told by that")
        before = await scraped(client, run.model)
        chance = random.Random(run.seed)
        for _ in range(PARTS):
            await part(client, run, chance)
            await settled(client, run)
            run.memory.append(int((await scraped(client, run.model))["process_resident_memory_bytes"]))
        after = await scraped(client, run.model)
        ended = after["finished"] - before["finished"]
        begun = run.streams // PARTS * PARTS - run.endings["dropped before it was sent"]
        if after["failed"]:
            run.problems.append(f"{after['failed']:.0f} sequences failed in the server")
        if not run.endings["read to its end"] <= ended <= begun:
            run.problems.append(f"{ended:.0f} sequences ended in the server, of {begun} that were asked for")
        if (grown := run.memory[-1] - max(run.memory[:2])) > most_growth:
            run.problems.append(f"memory grew by {grown / 2**20:.0f} MiB: {[size // 2**20 for size in run.memory]}")
        await fill(client, run)
        await settled(client, run)


async def part(client: httpx.AsyncClient, run: Soak, chance: random.Random) -> None:
    """A fifth of the streams, so many at a time."""
    free = asyncio.Semaphore(run.together)
    usual = run.seconds * run.together / run.slots  # until a stream is read to its end, among so many

    async def one(prompt: str, kind: float, after: float) -> None:
        async with free:
            said: list[str] = []
            most = round(after * run.tokens) if 0.4 <= kind < 0.7 else None
            task = asyncio.create_task(stream(client, run.body(prompt, run.tokens), said, most))
            if kind >= 0.7:
                await asyncio.wait([task], timeout=after * usual)
                task.cancel()
            try:
                run.endings[await task] += 1
            except asyncio.CancelledError:
                run.endings["dropped while it ran" if said else "dropped before a word"] += 1
            except (httpx.HTTPError, ValueError) as error:
                run.problems.append(f"a stream failed: {error!r}")
            text, expected = "".join(said), run.alone[prompt]
            whole = kind < 0.4
            if text != expected if whole else not expected.startswith(text):
                run.problems.append(f"{prompt!r} was continued {text!r}, and alone {expected!r}")

    chosen = [(chance.choice(run.prompts), chance.random(), chance.random()) for _ in range(run.streams // PARTS)]
    await asyncio.gather(*(one(*what) for what in chosen))


async def stream(client: httpx.AsyncClient, body: Mapping[str, object], said: list[str], most: int | None) -> str:
    """Read a completion into `said`, to its end or for `most` events; how it ended. ValueError: for another answer."""
    events = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if most is not None and events >= most:
                return "dropped after some events"
            if line == "data: [DONE]":
                return "read to its end"
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(line)
                said.append(event["choices"][0]["text"])
                events += 1
    raise ValueError("the stream ended without [DONE]")


async def settled(client: httpx.AsyncClient, run: Soak) -> None:
    """Wait until nothing runs or waits."""
    until = time.monotonic() + SETTLED_SECONDS
    while time.monotonic() < until:
        now = await scraped(client, run.model)
        if not now["running"] and not now["waiting"]:
            if now["held"]:
                run.problems.append(f"nothing runs, and {now['held']:.3f} of the cache is held")
            return
        await asyncio.sleep(0.05)
    run.problems.append(f"{now['running']:.0f} sequences still run and {now['waiting']:.0f} wait, for nobody")


async def fill(client: httpx.AsyncClient, run: Soak) -> None:
    """Every slot can be taken again, all at once."""
    bodies = [run.body(run.prompts[i % len(run.prompts)], 4 * run.tokens) for i in range(run.slots)]
    tasks = [asyncio.create_task(stream(client, body, [], None)) for body in bodies]
    full, used = False, 0.0
    while not full and not all(task.done() for task in tasks):
        used = max(used, (await scraped(client, run.model))["slots"])
        full = used == 1.0
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    run.problems += [f"a stream failed: {one!r}" for one in ended if isinstance(one, Exception)]
    if not full:
        run.problems.append(f"of all slots only {used:.0%} could be taken")


async def scraped(client: httpx.AsyncClient, model: str) -> dict[str, float]:
    """What the server says of the model, and its memory."""
    short = {
        "espalier_sequences_running": "running",
        "espalier_sequences_waiting": "waiting",
        "espalier_slot_usage_ratio": "slots",
        "espalier_kv_cache_usage_ratio": "held",
    }
    found = {"finished": 0.0, "failed": 0.0}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            if sample.name == "process_resident_memory_bytes":
                found[sample.name] = sample.value
            elif sample.labels.get("model") != model:
                continue
            elif sample.name in short:
                found[short[sample.name]] = sample.value
            elif sample.name == "espalier_finished_sequences_total":
                found["finished"] += sample.value
                found["failed"] += sample.value if sample.labels["finished_reason"] == "error" else 0.0
    return found


def main() -> None:
    from tokenizers import Tokenizer

    from benchmarks.generation import ours, weights
    from benchmarks.generation.prompts import Prompts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=24, help="of each stream")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=weights.KEPT, help="where weights are kept")
    options = parser.parse_args()
    console = Console()
    repository = weights.kept(options.folder / "weights" / "repository", ours.publish)
    tokenizer = Tokenizer.from_file(str(repository / ours.FLOAT32 / "1" / "tokenizer.json"))
    found = [prompt.text for prompt in Prompts(tokenizer).batches(16, 0)[0]]
    # Half of them begin alike, as chats with one system prompt do.
    prompts = found[:8] + [f"{found[-1]} {prompt}" for prompt in found[8:15]]
    start = time.monotonic()
    with ours.serving(repository, options.slots) as port:
        run = Soak(f"http://127.0.0.1:{port}", ours.FLOAT32, prompts, options.slots, options.tokens, options.streams)
        asyncio.run(soak(run, 64 * 2**20))
    console.print(f"{options.streams} streams in {time.monotonic() - start:.0f} s: {dict(run.endings)}")
    console.print(f"resident memory: {[size // 2**20 for size in run.memory]} MiB")
    for problem in run.problems:
        console.print(problem, markup=False)
    console.print("[red]not well" if run.problems else "every slot came back, nobody got another's words, memory flat")
    sys.exit(bool(run.problems))


if __name__ == "__main__":
    main()
