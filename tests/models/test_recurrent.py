"""Recurrent layers: the cells of the papers, deaf to padding, and as ONNX operators the same."""

from __future__ import annotations

import io
import math

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export.onnx import quiet
from models.recurrent_layers import Kind, Recurrent

KINDS: tuple[Kind, ...] = ("rnn", "lstm", "gru")
slow = pytest.mark.slow


def ragged(batch: int, length: int, inputs: int = 3) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, noise where there is padding; one is full, one has a single step."""
    random = torch.Generator().manual_seed(batch)
    lengths = torch.randint(1, length + 1, (batch,), generator=random)
    lengths[0], lengths[-1] = length, 1
    return torch.randn(batch, length, inputs, generator=random), lengths


def layer_of(kind: Kind, bidirectional: bool, layers: int = 2) -> Recurrent:
    torch.manual_seed(1)
    layer = Recurrent(kind, 3, 5, layers, bidirectional)
    for parameter in layer.parameters():  # biases that are all alike would hide gates in the wrong order
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_torch_makes_of_it_alone(kind: Kind, bidirectional: bool) -> None:
    layer = layer_of(kind, bidirectional)
    x, lengths = ragged(4, 7)
    outputs, final = layer(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, state = layer.cells(x[row : row + 1, :length])
        torch.testing.assert_close(outputs[row, :length], alone[0])
        assert not outputs[row, length:].any()
        hidden = state[0] if kind == "lstm" else state
        torch.testing.assert_close(final[row], hidden[-layer.directions :, 0].flatten())


def test_training_does_not_see_padding() -> None:
    layer = layer_of("gru", True)
    x, lengths = ragged(3, 6)
    x.requires_grad_()
    layer(x, lengths)[1].sum().backward()
    assert x.grad is not None
    padding = torch.arange(6) >= lengths[:, None]
    assert not x.grad[padding].any()
    assert x.grad[~padding].any(1).all()


def test_one_step_of_a_gru_by_hand() -> None:
    layer = Recurrent("gru", 1, 1)
    for name, values in {"weight_ih": (0.5, -1.0, 2.0), "weight_hh": (0.3, 0.7, -0.4)}.items():
        getattr(layer.cells, f"{name}_l0").data = torch.tensor(values)[:, None]
    layer.cells.bias_ih_l0.data = torch.tensor([0.1, 0.2, 0.3])
    layer.cells.bias_hh_l0.data = torch.tensor([-0.1, 0.4, 0.6])
    x, h = 0.8, 0.25
    reset = sigmoid(0.5 * x + 0.1 + 0.3 * h - 0.1)
    update = sigmoid(-1.0 * x + 0.2 + 0.7 * h + 0.4)
    candidate = math.tanh(2.0 * x + 0.3 + reset * (-0.4 * h + 0.6))
    expected = (1.0 - update) * candidate + update * h
    _, final = layer(torch.tensor([[[x]]]), torch.tensor([1]), (torch.tensor([[[h]]]),))
    assert final.item() == pytest.approx(expected, abs=1e-6)


def test_one_step_of_an_lstm_by_hand() -> None:
    layer = Recurrent("lstm", 1, 1)
    for name, values in {"weight_ih": (0.5, -1.0, 2.0, 0.9), "weight_hh": (0.3, 0.7, -0.4, 1.1)}.items():
        getattr(layer.cells, f"{name}_l0").data = torch.tensor(values)[:, None]
    layer.cells.bias_ih_l0.data = torch.tensor([0.1, 0.2, 0.3, 0.4])
    layer.cells.bias_hh_l0.data.zero_()
    x, h, c = 0.8, 0.25, -0.6
    enter, forget = sigmoid(0.5 * x + 0.3 * h + 0.1), sigmoid(-1.0 * x + 0.7 * h + 0.2)
    candidate, leave = math.tanh(2.0 * x - 0.4 * h + 0.3), sigmoid(0.9 * x + 1.1 * h + 0.4)
    cell = forget * c + enter * candidate
    _, state = layer.unroll(torch.tensor([[[x]]]), torch.tensor([1]), (torch.tensor([[[h]]]), torch.tensor([[[c]]])))
    assert state[1].item() == pytest.approx(cell, abs=1e-6)
    assert state[0].item() == pytest.approx(leave * math.tanh(cell), abs=1e-6)


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


class WithState(nn.Module):
    """A layer that begins where it is told to, as a decoder does."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        outputs, after = self.layer.unroll(x, lengths, state)
        return outputs, *after, self.layer(x, lengths)[1]


@pytest.mark.parametrize(
    ("kind", "bidirectional"),
    [
        pytest.param("rnn", True, marks=slow),
        pytest.param("lstm", True),
        pytest.param("gru", True),
        pytest.param("rnn", False, marks=slow),
        pytest.param("lstm", False, marks=slow),
        pytest.param("gru", False, marks=slow),
    ],
)
def test_the_operators_compute_the_same_at_any_batch_and_length(kind: Kind, bidirectional: bool) -> None:
    module = WithState(layer_of(kind, bidirectional))

    def arguments(batch: int, length: int) -> tuple[Tensor, ...]:
        states = 2 if kind == "lstm" else 1
        rows = 2 * module.layer.directions
        return *ragged(batch, length), *(torch.randn(rows, batch, 5) for _ in range(states))

    example, any_batch = arguments(2, 5), torch.export.Dim("batch")
    shapes = ({0: any_batch, 1: torch.export.Dim("length")}, {0: any_batch}, tuple({1: any_batch} for _ in example[2:]))
    with quiet():
        program = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    file = io.BytesIO()
    assert program is not None
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 9), (6, 3)):
        given = arguments(batch, length)
        expected = [answer.detach().numpy() for answer in module(*given)]
        names = [value.name for value in session.get_inputs()]
        found = session.run(None, dict(zip(names, (part.numpy() for part in given), strict=True)))
        for theirs, ours in zip(found, expected, strict=True):
            np.testing.assert_allclose(theirs, ours, atol=1e-5)
