"""Whether accuracy grows with depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.pictures import Picture, panels, png, table
from benchmarks.architectures.rows import recipe
from benchmarks.architectures.runs import Run
from finetune.recipe import Data, Recipe

SEEDS = (1, 2, 3)
# Many items to test on: differences of a percent are to be seen.
MANY = Data(test=0.4)


def perceptron(layers: int, seed: int) -> Recipe:
    return recipe("mlp", {"hidden": (128,) * layers}, epochs=15, rate=1e-3, seed=seed, data=MANY)


def convolutions(stages: int, seed: int) -> Recipe:
    hyperparameters = {"width": 24, "windows": (7,) * stages}
    return recipe("convnet1d", hyperparameters, epochs=25, rate=3e-3, batch=16, seed=seed, data=MANY)


def vgg(layers: int, seed: int) -> Recipe:
    hyperparameters = {"image_size": 32, "width": 0.125, "depth": layers}
    return recipe("vgg", hyperparameters, epochs=3, rate=2e-3, seed=seed, data=MANY)


@dataclass(frozen=True)
class Family:
    """Networks that differ in their depth only. words: for the document, what the depth is behind the last comma."""

    name: str
    words: str
    file: str
    depths: tuple[int, ...]
    make: Callable[[int, int], Recipe]

    def run(self, depth: int, seed: int) -> Run:
        return Run(name=f"depth-{self.name}-{depth}-{seed}", file=self.file, recipe=self.make(depth, seed))

    def runs(self) -> list[Run]:
        return [self.run(depth, seed) for depth in self.depths for seed in SEEDS]


FAMILIES = (
    Family(
        "mlp",
        "MLP on digits (10 × 10 pixels), hidden layers of 128",
        "small-digit-vectors.csv",
        (0, 1, 2, 3, 4),
        perceptron,
    ),
    Family("convnet1d", "convnet1d on outlines of leaves, stages", "leaves.jsonl", (1, 2, 3, 4), convolutions),
    Family("vgg", "VGG on digits (images), layers", "digits.zip", (11, 13, 16, 19), vgg),
)


def measure(finished: Finished) -> Section:
    figure, panes = panels(len(FAMILIES), width=10.0, height=2.8)
    rows = []
    verdicts = []
    grown = []
    for family, pane in zip(FAMILIES, panes, strict=True):
        accuracies = {
            depth: [finished.trained[family.run(depth, seed).name].metrics["accuracy"] for seed in SEEDS]
            for depth in family.depths
        }
        means = [mean(found) for found in accuracies.values()]
        spreads = [stdev(found) for found in accuracies.values()]
        pane.errorbar(family.depths, means, spreads, marker="o", markersize=4, capsize=3)
        pane.set(xlabel=family.words.rpartition(", ")[2], title=family.words.rpartition(", ")[0], ylabel="accuracy")
        pane.title.set_fontsize(9)
        pane.set_xticks(family.depths)
        rows += [
            (family.words if i == 0 else "", str(depth), f"{means[i]:.3f}", f"{spreads[i]:.3f}")
            for i, depth in enumerate(family.depths)
        ]
        best = max(range(len(means)), key=means.__getitem__)
        grown.append(best > 0)
        verdicts.append(
            f"{family.words.partition(' on ')[0]} gains {means[best] - means[0]:+.3f} from {family.depths[0]} to "
            f"{family.depths[best]}"
            + (
                ""
                if best == len(means) - 1
                else f", and {means[-1] - means[best]:+.3f} from there to {family.depths[-1]}"
            )
        )
    text = f"""Accuracy on held-out items, mean and standard deviation of {len(SEEDS)} seeds, each with a split of its \
own; nothing but the
depth differs.

{table(("networks", "depth", "accuracy", "deviation"), rows)}

{"; ".join(verdicts)}. Depth pays until the task is learned: {sum(grown)} of {len(grown)} families gain from it here."""
    return Section(
        "Accuracy grows with depth",
        all(grown),
        text,
        (Picture("depth.png", "Accuracy by depth", png(figure)),),
    )


CLAIM = Claim("depth", measure, tuple(run for family in FAMILIES for run in family.runs()))
