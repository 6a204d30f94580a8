"""Generation against other engines, all in one run: python -m benchmarks.generation [--quick] [--output FILE]

SmolLM2-135M-Instruct at 1, 4, 16 and 32 streams: our server over HTTP, in float32 and int8; transformers' generate,
onnxruntime-genai's batch generator and our graph in a bare loop, each in a process of its own; llama-cpp-python's
server over HTTP. Writes docs/generation.md. Peers are installed, and weights converted, in build/generation, where they
stay for the next run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from benchmarks.environments import NotInstalled, site_packages
from benchmarks.generation import document, ours, peers, weights
from benchmarks.generation.contenders import Contender, listening, loop, over_http
from benchmarks.generation.figures import BARE, OURS, TRANSFORMERS, aims, figures
from benchmarks.generation.measured import Measured
from benchmarks.generation.prompts import Prompts
from server.process import cores

ROOT = Path(__file__).parents[2]
STREAMS = (1, 4, 16, 32)
TOKENS = 128
ROUNDS = 2
# Prompts of a round at one stream, one after the other.
ALONE = 4
GENAI, LLAMA = "onnxruntime-genai", "llama-cpp-python"
INT8 = f"{OURS}, int8"
LOOKUP = f"{TRANSFORMERS}, prompt lookup"
PEERS = (TRANSFORMERS, GENAI, LLAMA)


@contextmanager
def llama(folder: Path) -> Iterator[Contender]:
    """Raises NotInstalled."""
    python = peers.environment(LLAMA, folder / "peers")
    model = weights.kept(folder / "weights" / "float32.gguf", weights.float32_gguf)
    threads = ["--n_threads", str(cores()), "--n_threads_batch", str(cores())]
    float32 = ["--type_k", "0", "--type_v", "0"]  # keys and values, too
    flags = ["--model", str(model), *threads, *float32, "--n_ctx", "2048", "--interrupt_requests", "false"]
    settings = f"its server, over HTTP; {cores()} threads, GGUF in float32; it serves one request at a time, "
    settings += "which is why 16 streams were measured once and 32 never"
    with listening([str(python), "-m", "llama_cpp.server", *flags], "/v1/models") as port:
        # Many streams take long, one after the other, and their rate is that of one.
        yield Contender(LLAMA, settings, over_http(port, {"model": "x", "repeat_penalty": 1.0}), {16: 1, 32: 0})


@contextmanager
def genai(folder: Path, checkpoint: Path, decode: Callable[[Sequence[int]], str]) -> Iterator[Contender]:
    """Raises NotInstalled."""
    python = peers.environment(GENAI, folder / "peers")
    builder = site_packages(python) / "onnxruntime_genai" / "models" / "builder.py"
    model = weights.kept(folder / "weights" / "genai", lambda path: weights.genai(builder, checkpoint, path))
    with loop(GENAI, python, "genai_loop", [str(model), str(cores())], decode) as contender:
        yield contender


def enter(stack: ExitStack, folder: Path, console: Console) -> tuple[list[Contender], dict[str, str], Tokenizer]:
    """All that can be measured here, started, and why the others cannot."""
    checkpoint = weights.kept(folder / "weights" / "checkpoint", weights.huggingface)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    threads = str(cores())

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    repository = weights.kept(folder / "weights" / "repository", ours.publish)
    port = stack.enter_context(ours.serving(repository, max(STREAMS)))
    graph = str(repository / ours.FLOAT32 / "1")
    there = [
        Contender(
            OURS,
            f"our server, over HTTP; {max(STREAMS)} slots; what a lone stream may go on with is guessed from its text",
            over_http(port, ours.body(ours.FLOAT32)),
        ),
        Contender(INT8, "the same server, weights in int8", over_http(port, ours.body(ours.INT8))),
        stack.enter_context(loop(BARE, Path(sys.executable), "bare_loop", [graph, threads, str(weights.END)], decode)),
        stack.enter_context(
            loop(TRANSFORMERS, Path(sys.executable), "transformers_loop", [str(checkpoint), threads], decode)
        ),
        replace(
            stack.enter_context(
                loop(LOOKUP, Path(sys.executable), "transformers_loop", [str(checkpoint), threads, "lookup"], decode)
            ),
            rounds=dict.fromkeys(STREAMS[1:], 0),
        ),
    ]
    missing = {}
    for name, made in ((GENAI, genai(folder, checkpoint, decode)), (LLAMA, llama(folder))):
        try:
            there.append(stack.enter_context(made))
        except (NotInstalled, RuntimeError) as error:
            console.print(f"[yellow]{name} is left out: {error}")
            missing[name] = str(error)
    return there, missing, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens; writes nothing")
    parser.add_argument("--folder", type=Path, default=weights.KEPT, help="where peers and weights are kept")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    streams, tokens, rounds = ((1, 4), 8, 1) if options.quick else (STREAMS, TOKENS, ROUNDS)
    console = Console()
    measured: dict[tuple[str, int], list[Measured]] = {}
    with ExitStack() as stack:
        with console.status("preparing weights and contenders"):
            there, missing, tokenizer = enter(stack, options.folder, console)
            prompts = Prompts(tokenizer)
            for contender in there:
                contender.measure(prompts.batches(4 if contender.takes_part(4, 0) else 1, ALONE), 4)
        start = time.monotonic()
        progress = stack.enter_context(Progress(console=console))
        task = progress.add_task("rounds", total=rounds * len(streams) * len(there))
        for round_ in range(rounds):
            for count in streams:
                batches = prompts.batches(count, ALONE)
                turn = (round_ + streams.index(count)) % len(there)
                for contender in there[turn:] + there[:turn]:
                    if contender.takes_part(count, round_):
                        progress.update(task, description=f"{contender.name}, {count} streams")
                        found = contender.measure(batches, tokens)
                        measured.setdefault((contender.name, count), []).append(found)
                        progress.console.print(f"{contender.name}, {count} streams: {found.rate:.0f} tokens/s")
                    progress.advance(task)
    all_figures, all_aims = figures(measured), aims(measured, PEERS)
    order = [contender.name for contender in there]
    all_figures.sort(key=lambda one: (one.streams, order.index(one.contender)))
    for one in all_figures:
        console.print(" | ".join(document.line(one)), markup=False)
    for aim in all_aims:
        console.print(
            f"to {aim.words} ({aim.other}): {aim.ratio:.2f}, aim {aim.aim:g}: {'met' if aim.met else 'NOT met'}"
        )
    run = document.Conditions(
        cores=cores(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        minutes=(time.monotonic() - start) / 60,
        rounds=rounds,
        tokens=tokens,
        alone=ALONE,
        settings={contender.name: contender.settings for contender in there},
        missing=missing,
        versions=versions(),
    )
    console.print(f"{run.minutes:.1f} minutes")
    if options.output is not None:
        whole = {"run": run, "figures": all_figures, "aims": all_aims}
        options.output.write_bytes(msgspec.json.format(msgspec.json.encode(whole)))
    if not options.quick:
        pictures = document.pictures(all_figures)
        folder = ROOT / "docs" / document.FOLDER
        folder.mkdir(exist_ok=True)
        for picture in pictures:
            (folder / picture.file).write_bytes(picture.content)
        (ROOT / "docs" / "generation.md").write_text(document.write(all_figures, all_aims, pictures, run))


def versions() -> dict[str, str]:
    """Of what was measured."""
    found = {"onnxruntime": next(filter(None, map(version_of, ("onnxruntime", "onnxruntime-gpu"))), "?")}
    found |= {name: version_of(name) or "?" for name in ("torch", "transformers")}
    for packages in peers.PACKAGES.values():
        name, _, version = packages[0].partition("==")
        found[name.partition("[")[0]] = version
    return found


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
