"""LSTM, GRU and RNN under trace: one step for all times at once, in operations that rules can look into.

torch runs a recurrent layer as one fused operation. Which of its channels go together does not depend on how many steps
there are, so a trace runs one step, from the hidden state that the inputs alone give. Only channels are right then, not
values; the model itself is never run this way.

    hidden H = 2, LSTM: weight_ih (8, I), weight_hh (8, 2)
    channel 0   rows 0 2 4 6 of weight_ih, weight_hh and both biases, column 0 of weight_hh, position 0 of the output

All layers and directions of a module have one `hidden_size`, so they lose the same channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

# Shape letters: B batch, T times, I inputs, H hidden, L layers, D directions.

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class _OneStep(nn.RNNBase):
    """A recurrent layer that goes one step."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return output, (L * D, B, H) last states; arguments and shapes as in `nn.LSTM`, `nn.GRU` and `nn.RNN`."""
        if isinstance(input, PackedSequence):
            return super().forward(input, hx)  # one operation without a rule: what reaches it is frozen, and it is said
        time = 1 if self.batch_first and input.dim() == 3 else 0
        before = [None, None] if hx is None else list(hx) if isinstance(hx, tuple | list) else [hx, None]
        x = input
        last: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer in range(self.num_layers):
            outs = []
            for suffix in ("", "_reverse") if self.bidirectional else ("",):
                states = [None if each is None else each[len(last[0])].unsqueeze(time) for each in before]
                h, c = self._step(x, f"_l{layer}{suffix}", *states)
                outs.append(h)
                for kept, state in zip(last, (h, c), strict=True):
                    kept.append(state.select(time, -1))
            x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
        h_n, c_n = map(torch.stack, last)
        return x, (h_n, c_n) if self.mode == "LSTM" else h_n

    def _step(self, x: Tensor, suffix: str, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return hidden and cell state at all times."""
        by_input = F.linear(x, self._get(f"weight_ih{suffix}"), self._get(f"bias_ih{suffix}"))
        first, _ = self._cell(by_input, None, None, c, suffix)
        h = first if h is None else first + h
        return self._cell(
            by_input, F.linear(h, self._get(f"weight_hh{suffix}"), self._get(f"bias_hh{suffix}")), h, c, suffix
        )

    def _cell(
        self, by_input: Tensor, by_hidden: Tensor | None, h: Tensor | None, c: Tensor | None, suffix: str
    ) -> tuple[Tensor, Tensor]:
        if self.mode == "GRU":
            reset, update, new = by_input.chunk(3, -1)
            if by_hidden is not None:
                gates = by_hidden.chunk(3, -1)
                new = new + torch.sigmoid(reset + gates[0]) * gates[2]
                update = update + gates[1]
            new = torch.tanh(new) * torch.sigmoid(update)
            return (new if h is None else new + h), new
        total = by_input if by_hidden is None else by_input + by_hidden
        if self.mode != "LSTM":
            state = torch.tanh(total)
            return state, state
        enter, forget, cell, out = total.chunk(4, -1)
        state = torch.sigmoid(enter) * torch.tanh(cell) + torch.sigmoid(forget)
        state = state if c is None else state + c
        result = torch.sigmoid(out) * torch.tanh(state)
        return (F.linear(result, self._get(f"weight_hr{suffix}")) if self.proj_size else result), state

    def _get(self, name: str) -> Any:
        return getattr(self, name, None)


class _OneStepLSTM(_OneStep, nn.LSTM):
    """An LSTM that goes one step."""


class _OneStepGRU(_OneStep, nn.GRU):
    """A GRU that goes one step."""


class _OneStepRNN(_OneStep, nn.RNN):
    """An RNN that goes one step."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: _OneStepLSTM, nn.GRU: _OneStepGRU, nn.RNN: _OneStepRNN}


@contextlib.contextmanager
def one_step(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run every plain LSTM, GRU and RNN among the modules for one step inside the `with`."""
    plain = [(module, type(module)) for module in modules if type(module) in _KINDS]
    try:
        for module, kind in plain:
            module.__class__ = _KINDS[kind]
        yield
    finally:
        for module, kind in plain:
            module.__class__ = kind


def recurrent_sizes(module: nn.RNNBase) -> dict[str, int]:
    """Return the widths of a recurrent layer's weights, by attribute."""
    weight, projection = module.weight_ih_l0, getattr(module, "weight_hr_l0", None)
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    sizes = {"input_size": columns, "hidden_size": rows // _GATES[module.mode]}
    if isinstance(projection, Tensor):
        sizes["proj_size"] = len(projection)
    return sizes
