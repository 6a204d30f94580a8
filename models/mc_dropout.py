"""Monte-Carlo dropout: the same network several times, each time without other units (Gal and Ghahramani 2016).

The units that a pass goes without are chosen once and kept with the weights: the same input always has the same answer,
whatever else is in its batch, and the graph holds no random numbers. Each unit is left out in the same share of the
passes, and what remains is scaled by just that share; of a linear network, the mean of the passes is then exactly what
it answers without dropout, which independent masks only come near.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor, nn

from models import catalog, heads, registry, votes
from models.network import AXES, Headed, Network
from models.spec import Embedding, ModelSpec

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Of a text or series: every network reads one that is a step longer.
FEW_STEPS = 8


class Masked(nn.Module):
    """In the place of a dropout layer: in training just that, else one mask for each pass, whose rows lie one pass
    behind the other."""

    def __init__(self, dropout: nn.Module, mask: Callable[[], Tensor]) -> None:
        super().__init__()
        self.dropout = dropout
        self.mask = mask

    def forward(self, units: Tensor) -> Tensor:
        """float32 [passes · batch, ...]."""
        if self.training:
            dropped: Tensor = self.dropout(units)
            return dropped
        mask = self.mask()
        return (_apart(units, len(mask)) * mask.unsqueeze(1)).flatten(0, 1)


def _apart(rows: Tensor, passes: int) -> Tensor:
    """[passes · batch, ...] → [passes, batch, ...]."""
    return rows.reshape(passes, -1, *rows.shape[1:])


class McDropout(Network):
    """A network with a head, answered for by all passes as `models.votes.joined` has it; `embedding` is their mean.

    shapes: of what each call of a dropout layer drops, without the batch, in the order of the calls; 1 along what has
    another size in another input, where one mask is for all (Gal and Ghahramani 2016, for recurrent networks). A
    trunk in which nothing is dropped runs once.
    """

    def __init__(self, spec: ModelSpec, member: Headed, passes: int, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if isinstance(member.task, Embedding):
            raise ValueError("mc_dropout: a network without a head has no answer to be uncertain about")
        self.spec = spec
        self.task = member.task
        self.member = member
        self.passes = passes
        self.inside = bool(_dropouts(member.trunk))
        for i, shape in enumerate(shapes):
            self.register_buffer(f"mask{i}", torch.ones(passes, *shape))
        self.calls = len(shapes)
        self.turn = itertools.count()
        for name, layer in _dropouts(member):
            parent, _, attribute = name.rpartition(".")
            setattr(member.get_submodule(parent), attribute, Masked(layer, self._next_mask))
        self.input_names = member.input_names
        self.output_names = (*votes.output_names(self.task), "embedding")

    def _next_mask(self) -> Tensor:
        mask: Tensor = getattr(self, f"mask{next(self.turn)}")
        return mask

    def draw(self, rates: Sequence[float], seed: int) -> None:
        """Choose the masks: float32 [passes, ...], 0 or `passes` over the passes in which the unit is kept."""
        generator = torch.Generator().manual_seed(seed)
        for i, rate in enumerate(rates):
            mask: Tensor = getattr(self, f"mask{i}")
            kept = max(1, round((1.0 - rate) * self.passes))
            order = torch.rand(mask.shape, generator=generator).argsort(dim=0)
            mask.copy_((order < kept) * (self.passes / kept))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return self.member.blocks()

    def measure(self, inputs: Callable[[], list[Tensor]], targets: Tensor) -> None:
        self.member.measure(inputs, targets)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """`inputs` in the order of `input_names`; in training the member's own answer."""
        if self.training:
            answer: dict[str, Tensor] = self.member(*inputs)
            return answer
        self.turn = itertools.count()
        if self.inside:
            embedding = self.member.trunk(*(self._repeated(one) for one in inputs))
            features, embedding = embedding, _apart(embedding, self.passes).mean(dim=0)
        else:
            embedding = self.member.trunk(*inputs)
            features = self._repeated(embedding)
        assert self.member.head is not None
        answers = heads.answer(self.member.head, self.member.dropout(features))
        apart = {name: _apart(value, self.passes) for name, value in answers.items()}
        return {**votes.joined(self.task, apart, "mean"), "embedding": embedding}

    def _repeated(self, rows: Tensor) -> Tensor:
        """[batch, ...] → [passes · batch, ...]."""
        return rows.unsqueeze(0).expand(self.passes, *[-1] * rows.ndim).flatten(0, 1)


def mc_dropout(member: Network, passes: int, seed: int, inputs: dict[str, Tensor]) -> McDropout:
    """`member` with dropout when it answers, too, its masks drawn anew.

    inputs: some rows of its input. Raises ValueError when no layer of it drops anything.
    """
    if not isinstance(member, Headed):
        raise ValueError(f"{member.spec.architecture} has no one trunk and head, which Monte-Carlo dropout is for")
    training = member.training
    calls = _calls(member, inputs)
    if not calls:
        raise ValueError(
            f"ensemble: {member.spec.architecture} drops nothing, so that all passes would be alike; give the model "
            "a `dropout` above 0"
        )
    shapes = [shape for shape, _ in calls]
    spec = ModelSpec(
        architecture="mc_dropout",
        hyperparameters={"member": msgspec.to_builtins(member.spec), "passes": passes, "shapes": shapes},
        task=member.spec.task,
        weights=member.spec.weights,
    )
    network = McDropout(spec, member, passes, shapes)
    network.draw([rate for _, rate in calls], seed)
    network.train(training)
    return network


def _dropouts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that drop something, by name."""
    return [(name, one) for name, one in module.named_modules() if isinstance(one, DROPOUT) and one.p > 0.0]


def _calls(member: Headed, inputs: dict[str, Tensor]) -> list[tuple[list[int], float]]:
    """Shape and rate of every call of a dropout layer, in their order."""
    other = {name: _of_another_length(name, value) for name, value in inputs.items()}
    both: list[list[tuple[list[int], float]]] = []
    for batch in (inputs, other):
        calls: list[tuple[list[int], float]] = []

        def note(
            layer: nn.Module, given: tuple[Tensor], _: object, calls: list[tuple[list[int], float]] = calls
        ) -> None:
            shape = list(given[0].shape[1:])
            if not isinstance(layer, nn.Dropout):  # whole channels
                shape[1:] = [1] * (len(shape) - 1)
            calls.append((shape, float(layer.p)))  # type: ignore[arg-type]

        hooks = [layer.register_forward_hook(note) for _, layer in _dropouts(member)]
        with torch.no_grad():
            member.eval()(*(batch[name] for name in member.input_names))
        for hook in hooks:
            hook.remove()
        both.append(calls)
    return [
        ([size if size == other else 1 for size, other in zip(one, two, strict=True)], rate)
        for (one, rate), (two, _) in zip(*both, strict=True)
    ]


def _of_another_length(name: str, value: Tensor) -> Tensor:
    """A step less along every axis whose length is not fixed, a step more where there are few."""
    for axis in AXES.get(name, {}):
        length = value.shape[axis]
        if length > FEW_STEPS:
            value = value.narrow(axis, 0, length - 1)
        else:
            value = torch.cat([value, value.narrow(axis, length - 1, 1)], dim=axis)
    return value


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.McDropoutParameters)
    member = registry.build(parameters.member)
    if not isinstance(member, Headed):
        raise ValueError(f"mc_dropout: {member.spec.architecture} has no one trunk and head")
    return McDropout(spec, member, parameters.passes, parameters.shapes)
