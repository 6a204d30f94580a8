"""Recurrent layers whose padding does not matter, in PyTorch and as ONNX's own operators.

Elman's network (Elman 1990), LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000) and GRU
(Cho et al. 2014), in both directions where asked (Schuster and Paliwal 1997).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Kind = Literal["rnn", "lstm", "gru"]
# The gates as ONNX orders them, in PyTorch's numbering: LSTM iofc of ifco, GRU zrh of rzh.
ONNX_ORDER: dict[Kind, tuple[int, ...]] = {"rnn": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


class Recurrent(nn.Module):
    """float32 [batch, length, inputs] → outputs [batch, length, directions · width], zero where there is padding.

    Rows are padded at the end only; the reverse direction begins at the end of each row. `dropout` is between layers.
    """

    def __init__(
        self,
        kind: Kind,
        inputs: int,
        width: int,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.width = width
        self.layers = layers
        self.directions = 2 if bidirectional else 1
        cells = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[kind]
        self.cells: nn.RNNBase = cells(
            inputs,
            width,
            layers,
            batch_first=True,
            dropout=dropout if layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        self._initialize()

    def forward(self, x: Tensor, lengths: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Outputs, and `final` [batch, directions · width]: the top layer's last real state of each direction.

        lengths: int64 [batch], real steps of each row, at least 1. state: as `unroll` takes it.
        """
        outputs, state = self.unroll(x, lengths, state)
        return outputs, state[0][-self.directions :].transpose(0, 1).flatten(1)

    def unroll(
        self, x: Tensor, lengths: Tensor | None, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs, and the state after each row's last real step; without `lengths` every step is real.

        A state is (hidden,), for an LSTM (hidden, cell), each [layers · directions, batch, width], the directions of a
        layer side by side; None begins with zeros.
        """
        if torch.onnx.is_in_onnx_export():
            return self._operators(x, lengths, state)
        given = state if state is None or self.kind == "lstm" else state[0]
        if lengths is None:
            whole, after = self.cells(x, given)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            outputs, after = self.cells(packed, given)
            whole, _ = pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])
        return whole, tuple(after) if self.kind == "lstm" else (after,)

    def _operators(
        self, x: Tensor, lengths: Tensor | None, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `unroll`, for the exporter: it freezes the length of PyTorch's own layers without a word."""
        steps = x.transpose(0, 1)
        batch, length, directions = x.shape[0], x.shape[1], self.directions
        real = None if lengths is None else lengths.to(torch.int32)
        after: list[tuple[Tensor, ...]] = []
        shapes: list[tuple[int | torch.SymInt, ...]] = [(length, directions, batch, self.width)]
        shapes += [(directions, batch, self.width)] * (2 if self.kind == "lstm" else 1)
        attributes: dict[str, Any] = {"hidden_size": self.width}
        if directions == 2:
            attributes["direction"] = "bidirectional"
        if self.kind == "gru":
            attributes["linear_before_reset"] = 1  # the reset gate is applied behind the matrix, as PyTorch does
        for layer in range(self.layers):
            first = slice(layer * directions, (layer + 1) * directions)
            initial = () if state is None else tuple(part[first] for part in state)
            outputs, *ends = torch.onnx.ops.symbolic_multi_out(
                self.kind.upper(),
                (steps, *self._weights(layer), real, *initial),
                attrs=attributes,
                dtypes=[x.dtype] * len(shapes),
                shapes=shapes,
                version=14,
            )
            after.append(tuple(ends))
            steps = outputs.transpose(1, 2).flatten(2)
        return steps.transpose(0, 1), tuple(torch.cat(parts) for parts in zip(*after, strict=True))

    def _weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """ONNX's W [directions, gates · width, inputs], R [directions, gates · width, width] and B, both biases."""
        order = ONNX_ORDER[self.kind]

        def gates(name: str) -> Tensor:
            rows = getattr(self.cells, name)
            return torch.cat([rows[gate * self.width : (gate + 1) * self.width] for gate in order])

        names = [f"l{layer}{end}" for end in ("", "_reverse")[: self.directions]]
        return (
            torch.stack([gates(f"weight_ih_{name}") for name in names]),
            torch.stack([gates(f"weight_hh_{name}") for name in names]),
            torch.stack([torch.cat([gates(f"bias_ih_{name}"), gates(f"bias_hh_{name}")]) for name in names]),
        )

    def _initialize(self) -> None:
        """Glorot's weights from the input, orthogonal ones between states (Saxe et al. 2014), biases of 0; a forget
        gate starts open, with a bias of 1 (Jozefowicz et al. 2015)."""
        for name, parameter in self.cells.named_parameters():
            if name.startswith("weight_ih"):
                for part in parameter.data.chunk(len(ONNX_ORDER[self.kind])):
                    nn.init.xavier_uniform_(part)
            elif name.startswith("weight_hh"):
                for part in parameter.data.chunk(len(ONNX_ORDER[self.kind])):
                    nn.init.orthogonal_(part)
            else:
                nn.init.zeros_(parameter)
                if self.kind == "lstm" and name.startswith("bias_ih"):
                    nn.init.ones_(parameter.data[self.width : 2 * self.width])
