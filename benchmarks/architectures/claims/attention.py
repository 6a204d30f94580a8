"""Whether attention helps to translate longer sentences, and what it looks at."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from benchmarks.architectures import data, runs
from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.pictures import Picture, panels, png, table
from benchmarks.architectures.rows import recipe
from benchmarks.architectures.runs import Run
from export.bundle import read_manifest
from export.processing.inputs import TextInput
from export.processing.text import TextProcessor
from export.reports.chrf import chrf
from finetune.recipe import Data
from server.runtime.decoding import Prompt
from server.runtime.placement import Placement
from server.runtime.search import Candidate, Options
from server.runtime.session import Session
from server.runtime.writer import Writer, writer

# Words of a source: where each group begins, and the end of the last.
BOUNDS = (1, 3, 6, 11, 1000)
RESAMPLES = 200
# A difference in chrF between two groups that is worth a word.
CLEAR = 0.01
TOKENS = 48
# How long a sentence is whose attention can still be read in a picture, in tokens.
SHOWN = (9, 16)


UNSEEN = "new-translations.csv"


def run_of(attention: str) -> Run:
    network = {"vocabulary_size": 1500, "embedding": 64, "width": 96, "dropout": 0.2, "attention": attention}
    return Run(
        name=f"attention-{attention}",
        file="known-translations.csv",
        recipe=recipe("seq2seq", network, epochs=25, rate=3e-3, data=Data(test=0.02), max_length=48),
    )


RUNS = {"without attention": run_of("none"), "with attention": run_of("additive")}


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
    manifest, placed = read_manifest(folder), Placement(parallel=1, threads=1)
    assert isinstance(manifest.input, TextInput)
    source = TextProcessor(manifest.input, (folder / manifest.input.tokenizer).read_bytes())
    model = Session(folder / "model.onnx", placed)
    made = writer(folder, manifest, model, source, placed)
    tokens = source.encode(list(texts))
    attends = "attention" in {tensor.name for tensor in manifest.graphs["decoder"].outputs}
    prompts = [Prompt(row, Options(max_tokens=TOKENS, attention=attends)) for row in tokens]
    return Translated(made, tokens, [best[0] for best in made.decoder.decode(prompts)])


def measure(finished: Finished) -> Section:
    with data.prepared(UNSEEN, runs.files(finished.folder)).open(newline="", encoding="utf-8") as file:
        sources, references = zip(*((row["text"], row["translation"]) for row in csv.DictReader(file)), strict=True)
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
    longest_most = bool(gain[-1] > gain[0] + CLEAR)
    verdict = (
        "It helps with the longest more than with the shortest."
        if longest_most
        else "It does not help with the longest more than with the shortest: these messages are few and short."
    )
    text = f"""Two encoder–decoders of GRUs that differ in attention only translate Django's messages from English, \
Spanish, Portuguese, Catalan and Galician into Italian: chrF of their greedy translations of {len(set(references))} \
messages that
were held out in all five languages ({len(sources)} sources), by the length of the source.

{table(("words", "sources", *RUNS, "difference"), rows)}

Attention changes chrF by {gain[0]:+.3f} for the shortest messages and by {gain[-1]:+.3f} for the longest; 90 % of
{RESAMPLES} resamplings of these messages lie from {low:+.3f} to {high:+.3f}.
{verdict} On the right, what the network looks at
in one of its best translations: “{sources[shown]}” becomes “{attentive.texts()[shown]}”."""
    title = "Attention helps to translate longer sentences"
    picture = Picture("attention.png", "Translation by length, and an attention map", png(figure))
    return Section(title, low > 0.0 and longest_most, text, (picture,))


def interval(written: Sequence[Sequence[str]], references: Sequence[str], group: np.ndarray) -> tuple[float, float]:
    """What 90 % of the differences in chrF lie between, of two systems on resampled texts (Koehn 2004); a message is
    drawn with its sources in all languages, which are alike."""
    random = np.random.default_rng(0)
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for i in group:
        alike[references[i]].append(int(i))
    messages = list(alike.values())
    gains = []
    for _ in range(RESAMPLES):
        drawn = [i for number in random.integers(len(messages), size=len(messages)) for i in messages[number]]
        before, after = (chrf([texts[i] for i in drawn], [references[i] for i in drawn]) for texts in written)
        gains.append(after - before)
    low, high = np.quantile(gains, [0.05, 0.95])
    return float(low), float(high)


def example(found: Translated, references: Sequence[str]) -> int:
    """Of the texts of a length that can be shown, the one that is translated best; of equals the longest."""
    low, high = SHOWN
    shown = [i for i, tokens in enumerate(found.tokens) if low <= len(tokens) <= high]
    texts = found.texts()
    return max(shown, key=lambda i: (chrf([texts[i]], [references[i]]), len(found.tokens[i])))


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
