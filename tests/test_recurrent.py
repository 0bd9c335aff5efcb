"""LSTM, GRU and RNN behind convolutions: inputs and hidden states are channels, and the cut is the mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import masked, relative_error, shake
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import compressor
from compressor.graph import is_torch_module

X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
INPUTS = 16 * 2  # channels times height, behind the pooling


class Reader(nn.Module):
    """Reads an image column by column, as text recognition does."""

    def __init__(self, kind: type[nn.RNNBase], how: dict[str, Any], use: str = "all", start: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.rnn = kind(INPUTS, 12, **how)
        width = how.get("proj_size") or 12
        self.head = nn.Linear(width * (1 + how.get("bidirectional", False) if use == "all" else 1), 5)
        self.use, self.start = use, nn.Parameter(torch.randn(1, 1, width)) if start else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv(x)), 2).permute(0, 3, 1, 2).flatten(2)  # (B, T, C * H)
        h = h if self.rnn.batch_first else h.transpose(0, 1)
        out, last = self.rnn(h, self.start.expand(-1, len(x), -1)) if self.start is not None else self.rnn(h)
        if self.use == "all":
            return self.head(out)
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


CASES: dict[str, tuple[type[nn.RNNBase], dict[str, Any], str]] = {
    "LSTM": (nn.LSTM, {"batch_first": True}, "all"),
    "LSTM, time first, last state": (nn.LSTM, {}, "last"),
    "LSTM, both ways, two layers": (nn.LSTM, {"num_layers": 2, "bidirectional": True}, "all"),
    "LSTM with projection": (nn.LSTM, {"proj_size": 6, "batch_first": True}, "all"),
    "LSTM without biases": (nn.LSTM, {"bias": False}, "all"),
    "GRU": (nn.GRU, {"batch_first": True}, "all"),
    "GRU, two layers, last state": (nn.GRU, {"num_layers": 2}, "last"),
    "GRU, both ways": (nn.GRU, {"bidirectional": True}, "all"),
    "RNN": (nn.RNN, {"batch_first": True}, "all"),
    "RNN of ReLUs": (nn.RNN, {"nonlinearity": "relu"}, "last"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cut_is_the_mask_and_training_goes_on(name: str) -> None:
    kind, how, use = CASES[name]
    model = shake(Reader(kind, how, use)).eval()
    graph = compressor.trace(model, X)
    assert type(model.rnn) is kind
    assert all(group.exact for group in graph.groups)
    projected = {"rnn#2": 6} if "proj_size" in how else {}
    assert graph.sizes() == {"conv": 16, "rnn": 12, **projected}
    keep = {group: torch.arange(1, size, 2) for group, size in graph.sizes().items()}
    expected = masked(graph, keep)(X)
    compressor.cut(graph, keep)
    assert relative_error(model(X), expected) <= 1e-12
    assert (model.rnn.input_size, model.rnn.hidden_size) == (INPUTS // 2, 6)
    assert model.rnn.proj_size == (3 if projected else 0)
    optimizer = torch.optim.Adam(model.train().parameters())
    model(X).square().mean().backward()
    optimizer.step()
    assert model.eval()(torch.cat([X, X], -1)).isfinite().all()  # twice as many steps


def test_members_of_an_lstm_by_hand() -> None:
    model = Reader(nn.LSTM, {"num_layers": 2, "batch_first": True}).double()
    group = compressor.trace(model, X)["rnn"]
    rows = [[channel + 12 * gate for gate in range(4)] for channel in range(12)]
    each = [[channel] for channel in range(12)]
    expected = {
        f"rnn.{kind}_l{layer}": rows for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for layer in (0, 1)
    }
    found = {(member.tensor, member.dim): member.positions.tolist() for member in group.members}
    assert found == {
        **{(name, 0): where for name, where in expected.items()},
        **{(name, 1): each for name in ("rnn.weight_hh_l0", "rnn.weight_hh_l1", "rnn.weight_ih_l1", "head.weight")},
    }


def test_a_first_state_of_the_models_own_follows() -> None:
    model = shake(Reader(nn.GRU, {"batch_first": True}, start=True)).eval()
    graph = compressor.trace(model, X)
    keep = {name: torch.arange(size // 2) for name, size in graph.sizes().items()}
    expected = masked(graph, keep)(X)
    before = model.start.detach().clone()
    compressor.cut(graph, keep)
    assert torch.equal(model.start, before[..., :6])
    assert relative_error(model(X), expected) <= 1e-12


def test_pruning_in_training_shrinks_it_and_saves_it(tmp_path) -> None:
    torch.manual_seed(0)
    model = Reader(nn.LSTM, {"batch_first": True}).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = compressor.Pruner(model, X.float(), "l1", 0.5, optimizer=optimizer, total_steps=20, prune_every=2)
    for _ in range(20):
        pruner.loss(X.float(), torch.zeros(2, 5), lambda out, y: F.mse_loss(out.mean(1), y)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.result().reached
    assert model.rnn.hidden_size < 12
    compressor.save(model.eval(), tmp_path / "m.safetensors")
    loaded = compressor.load(tmp_path / "m.safetensors", factory=lambda: Reader(nn.LSTM, {"batch_first": True}))
    assert torch.equal(loaded(X.float()), model(X.float()))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.head = nn.Linear(3, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.first(x), torch.tensor([4, 2]), batch_first=True)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def test_what_is_packed_is_frozen_and_it_is_said() -> None:
    model, x = shake(Packed()).eval(), torch.randn(2, 4, 3, dtype=torch.float64)
    graph = compressor.trace(model, x)
    assert graph.sizes() == {"rnn": 6}  # torch takes its steps one by one then
    assert any("no axis rule for op 'aten._pack_padded_sequence'" in note for note in graph.notes)
    keep = {"rnn": torch.arange(3)}
    expected = masked(graph, keep)(x)
    compressor.cut(graph, keep)
    assert relative_error(model(x), expected) <= 1e-12


def test_a_trace_leaves_the_layers_as_they_were() -> None:
    model = Reader(nn.LSTM, {})
    before = copy.deepcopy(model.state_dict())
    compressor.trace(model, X.float())
    assert is_torch_module(model.rnn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_sizes_are_right_when_a_gpu_is_asked_to_lay_weights_together(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 6, batch_first=True))
    graph = compressor.trace(FirstOutput(model), torch.randn(2, 5, 3))
    seen = []

    def flatten(self: nn.LSTM) -> None:
        seen.append(((4 * self.hidden_size, self.input_size), tuple(self.weight_ih_l0.shape)))

    monkeypatch.setattr(nn.LSTM, "flatten_parameters", flatten)
    compressor.cut(graph, {name: torch.arange(size // 2) for name, size in graph.sizes().items()})
    assert seen
    assert all(said == shape for said, shape in seen)


class FirstOutput(nn.Module):
    """A Linear, an LSTM and a Linear."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0])
