"""Whether attention helps to translate longer sentences, and what it looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from benchmarks.architectures import data, runs
from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.held_out import held_out
from benchmarks.architectures.pictures import Picture, panels, png, table
from benchmarks.architectures.rows import ROWS
from benchmarks.architectures.runs import Run
from export.bundle import read_manifest
from export.processing.inputs import TextInput
from export.processing.text import TextProcessor
from export.reports.chrf import chrf
from server.runtime.decoding import Prompt
from server.runtime.search import Candidate, Options
from server.runtime.session import Session
from server.runtime.writer import Writer, writer
from server.settings import Settings

# Words of a source: where each group begins, and the end of the last.
BOUNDS = (1, 3, 6, 11, 1000)
RESAMPLES = 200
TOKENS = 48
# How long a sentence is whose attention can still be read in a picture, in tokens.
SHOWN = (9, 16)


def run_of(name: str) -> Run:
    return next(row.run for row in ROWS if row.run.name == name)


RUNS = {"without attention": run_of("seq2seq"), "with attention": run_of("seq2seq-attention")}


@dataclass(frozen=True)
class Translated:
    """What a published network makes of some texts; tokens: of each source."""

    writer: Writer
    tokens: list[list[int]]
    answers: list[Candidate]

    def texts(self) -> list[str]:
        return [self.writer.target.decode(answer.tokens) for answer in self.answers]


def translate(folder: Path, texts: Sequence[str]) -> Translated:
    """As the server does: greedy, many at once."""
    manifest, settings = read_manifest(folder), Settings(parallel_runs=1, intra_op_threads=1)
    assert isinstance(manifest.input, TextInput)
    source = TextProcessor(manifest.input, (folder / manifest.input.tokenizer).read_bytes())
    model = Session(folder / "model.onnx", [], 1, 1)
    made = writer(folder, manifest, model, source, settings)
    tokens = source.encode(list(texts))
    attends = "attention" in {tensor.name for tensor in manifest.graphs["decoder"].outputs}
    prompts = [Prompt(row, Options(max_tokens=TOKENS, attention=attends)) for row in tokens]
    return Translated(made, tokens, [best[0] for best in made.decoder.decode(prompts)])


def measure(finished: Finished) -> Section:
    run = RUNS["with attention"]
    test = held_out(data.prepared(run.file, runs.files(finished.folder)), run.recipe).test
    sources, references = test.contents, [str(one) for one in test.targets]
    found = {words: translate(finished.bundle(one.name), sources) for words, one in RUNS.items()}
    lengths = np.array([len(source.split()) for source in sources])
    groups = [np.flatnonzero((lengths >= low) & (lengths < high)) for low, high in pairwise(BOUNDS)]
    scores = {
        words: [chrf([one.texts()[i] for i in group], [references[i] for i in group]) for group in groups]
        for words, one in found.items()
    }
    labels = [f"{lengths[group].min()} to {lengths[group].max()}" for group in groups]
    without, having = (np.array(scores[words]) for words in RUNS)
    rows = [
        (label, str(len(group)), f"{one:.3f}", f"{other:.3f}", f"{other - one:+.3f}")
        for label, group, one, other in zip(labels, groups, without, having, strict=True)
    ]
    figure, (bars, matrix) = panels(2, width=10.0, height=4.2)
    places = np.arange(len(groups))
    for i, (words, values) in enumerate(scores.items()):
        bars.bar(places + 0.4 * i - 0.2, values, 0.4, label=words)
    bars.set(xlabel="words of the source", ylabel="chrF", xticks=places, xticklabels=labels)
    bars.legend(fontsize=8)
    attentive = found["with attention"]
    shown = example(attentive, references)
    attention_map(matrix, attentive, shown)
    gain = having - without
    low, high = interval([one.texts() for one in found.values()], references, groups[-1])
    text = f"""Two encoder–decoders of GRUs that differ in attention only translate Django's messages into Italian:
chrF of their translations of {len(sources)} held-out messages, greedy, by the length of the source.

{table(("words", "messages", *RUNS, "difference"), rows)}

Attention changes chrF by {gain[0]:+.3f} for the shortest messages and by {gain[-1]:+.3f} for the longest; 90 % of
{RESAMPLES} resamplings of these messages lie from {low:+.3f} to {high:+.3f}. A message that is held out in one language
may have been learned from another, so that much can be known by heart, which attention is not needed for. On the right,
what the network looks at in one of its best translations: “{sources[shown]}” becomes “{attentive.texts()[shown]}”."""
    title = "Attention helps to translate longer sentences"
    holds = bool(low > 0.0 and gain[-1] > gain[0])
    picture = Picture("attention.png", "Translation by length, and an attention map", png(figure))
    return Section(title, holds, text, (picture,))


def interval(written: Sequence[Sequence[str]], references: Sequence[str], group: np.ndarray) -> tuple[float, float]:
    """What 90 % of the differences in chrF lie between, of two systems on resampled texts (Koehn 2004)."""
    random = np.random.default_rng(0)
    gains = []
    for _ in range(RESAMPLES):
        drawn = random.choice(group, len(group))
        before, after = (chrf([texts[i] for i in drawn], [references[i] for i in drawn]) for texts in written)
        gains.append(after - before)
    low, high = np.quantile(gains, [0.05, 0.95])
    return float(low), float(high)


def example(found: Translated, references: Sequence[str]) -> int:
    """Of the texts of a length that can be shown, the one that is translated best."""
    low, high = SHOWN
    shown = [i for i, tokens in enumerate(found.tokens) if low <= len(tokens) <= high]
    texts = found.texts()
    return max(shown, key=lambda i: chrf([texts[i]], [references[i]]))


def attention_map(axes: Axes, found: Translated, item: int) -> None:
    """Rows are the tokens that are written, columns those of the source."""
    answer = found.answers[item]
    assert answer.attention is not None
    read = [found.writer.source.token(token).strip() for token in found.tokens[item]]
    written = [found.writer.target.token(token).strip() for token in answer.tokens]
    axes.imshow(answer.attention[: len(written), : len(read)], cmap="Greys", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(read)), read, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(written)), written, fontsize=7)
    axes.grid(visible=False)


CLAIM = Claim("attention", measure, tuple(RUNS.values()))
