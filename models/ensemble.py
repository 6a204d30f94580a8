"""Ensemble: several networks that read the same input, answered for as one (Breiman 1996, "Bagging Predictors")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import msgspec
import torch
from torch import Tensor, nn

from models import catalog, registry, votes
from models.catalog import Vote
from models.network import Network, complete
from models.spec import Binary, Classification, ModelSpec, MultiLabel, MultiTask, Regression

HEADED = Classification | Binary | MultiLabel | Regression | MultiTask


class Ensemble(Network):
    """The members' answers as `models.votes.joined` has them. `embedding` float32 [batch, sum of the members' widths]:
    theirs side by side, since their features have nothing in common."""

    def __init__(self, spec: ModelSpec, members: Sequence[Network], vote: Vote) -> None:
        super().__init__()
        task = complete(spec)
        if not isinstance(task, HEADED):
            raise ValueError("an ensemble joins networks that answer classes, labels or numbers")
        self.spec = spec
        self.task = task
        self.members = nn.ModuleList(members)
        self.vote = vote
        self.input_names = members[0].input_names
        self.output_names = (*votes.output_names(task), "embedding")

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Those of the members that are as far from the head are one block, of their name or names."""
        levels = zip_longest(*(reversed(member.blocks()) for member in self._networks()))
        blocks: list[tuple[str, nn.Module]] = []
        for level in levels:
            there = [block for block in level if block is not None]
            blocks.append(("+".join(dict.fromkeys(name for name, _ in there)), nn.ModuleList(m for _, m in there)))
        return blocks[::-1]

    def measure(self, inputs: Callable[[], list[Tensor]], targets: Tensor) -> None:
        for member in self._networks():
            member.measure(inputs, targets)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """`inputs` in the order of `input_names`."""
        answers = [member(*inputs) for member in self.members]
        outputs = [name for name in answers[0] if name != "embedding" and not name.startswith("uncertainty")]
        stacked = {name: torch.stack([answer[name] for answer in answers]) for name in outputs}
        embedding = torch.cat([answer["embedding"] for answer in answers], dim=1)
        return {**votes.joined(self.task, stacked, self.vote), "embedding": embedding}

    def _networks(self) -> list[Network]:
        return list(self.members)  # type: ignore[arg-type]  # a ModuleList forgets what its modules are


def ensemble(members: Sequence[Network], vote: Vote) -> Ensemble:
    """Networks of the same task and input as one; they stay what they are."""
    specs = [member.spec for member in members]
    weights = {spec.weights for spec in specs}
    return Ensemble(
        ModelSpec(
            architecture="ensemble",
            hyperparameters={"members": msgspec.to_builtins(specs), "vote": vote},
            task=specs[0].task,
            weights=weights.pop() if len(weights) == 1 else None,
        ),
        members,
        vote,
    )


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.EnsembleParameters)
    return Ensemble(spec, [registry.build(member) for member in parameters.members], parameters.vote)
