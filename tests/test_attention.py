"""Attention that may lose heads: the same sums as torch's, whole heads cut, and only where a cut makes it necessary."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import masked, random_keep, relative_error, shake
from torch import Tensor, nn

import compressor
from compressor.graph.attention import HeadwiseAttention, headwise

OPTIONS = {
    "packed": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other keys": {"kdim": 6, "vdim": 10},
    "bias source": {"add_bias_kv": True},
    "zero source": {"add_zero_attn": True},
    "both sources": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "mask": {"attn_mask": torch.tensor([[False, True, True], [False, False, True], [False] * 3, [False] * 3])},
    "mask a head": {"attn_mask": torch.randn(2 * 3, 4, 3, dtype=torch.float64), "need_weights": False},
    "causal": {"attn_mask": torch.ones(4, 3).triu(1).bool(), "is_causal": True, "need_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False, False, True], [False, True, True]])},
    "padding and mask": {
        "key_padding_mask": torch.tensor([[False, False, True], [False, False, False]]),
        "attn_mask": torch.zeros(4, 3, dtype=torch.bool),
        "need_weights": False,
    },
}


def inputs(module: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(2, 4, module.embed_dim), (2, 3, module.kdim), (2, 3, module.vdim)]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return (q, k, v) if module.batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_what_torch_computes(options: str, call: str) -> None:
    if call == "causal" and "source" in options:
        pytest.skip("torch lets the hint hide the added source too, whatever the mask says")
    module = shake(nn.MultiheadAttention(12, 3, **OPTIONS[options]))
    args = inputs(module)
    expected = module(*args, **CALLS[call])
    with headwise([module]):
        assert type(module) is HeadwiseAttention
        result = module(*args, **CALLS[call])
    assert type(module) is nn.MultiheadAttention
    assert torch.allclose(result[0], expected[0], rtol=0, atol=1e-12)
    assert (result[1] is None) == (expected[1] is None)
    assert result[1] is None or torch.allclose(result[1], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch_too(batch_first: bool) -> None:
    module = shake(nn.MultiheadAttention(12, 3, batch_first=batch_first))
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = module(x, x, x)
    with headwise([module]):
        result = module(x, x, x)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(result, expected, strict=True))


def test_a_causal_hint_without_a_mask_is_refused_as_torch_does() -> None:
    module = shake(nn.MultiheadAttention(12, 3))
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    with headwise([module]), pytest.raises(RuntimeError, match="pass attn_mask with it"):
        module(x, x, x, is_causal=True)


class Encoder(nn.Module):
    """A transformer's encoder between two layers that can lose channels."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
        self.embed = nn.Linear(5, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


@pytest.mark.parametrize("norm_first", [True, False])
def test_whole_heads_are_cut_and_masked_is_cut(norm_first: bool) -> None:
    model = shake(Encoder(norm_first=norm_first))
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = compressor.trace(model, x)
    heads = [group.name for group in graph.groups if group.name.endswith("self_attn")]
    assert [(graph[name].size, graph[name].exact) for name in heads] == [(4, True), (4, True)]
    keep = {name: kept for name, kept in random_keep(graph).items() if graph[name].exact}
    expected = masked(graph, keep)(x)
    compressor.cut(graph, keep)
    attention = model.encoder.layers[0].self_attn
    assert (attention.num_heads, attention.head_dim, tuple(attention.in_proj_weight.shape)) == (2, 4, (24, 16))
    assert relative_error(model(x).detach(), expected.detach()) < 1e-12
    with torch.no_grad():  # where torch would take its fused kernel
        assert relative_error(model(x), expected) < 1e-12


def test_the_embedding_can_be_cut_too_and_the_model_still_runs_and_trains() -> None:
    model = shake(Encoder())
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = compressor.trace(model, x)
    compressor.cut(graph, random_keep(graph))
    assert model.encoder.layers[1].self_attn.embed_dim == 8
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attention_that_no_cut_touches_stays_torchs_own() -> None:
    model = shake(Encoder())
    graph = compressor.trace(model, torch.randn(2, 7, 5, dtype=torch.float64))
    keep = {group.name: [0, 1] for group in graph.groups if "linear1" in group.name}
    assert keep
    compressor.cut(graph, keep)
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention


def test_a_refused_cut_gives_torchs_class_back() -> None:
    model = shake(Encoder())
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = compressor.trace(model, x)
    before = copy.deepcopy(vars(model.encoder.layers[0].self_attn))

    def refuse() -> None:
        raise compressor.errors.CutError("no reason")

    with pytest.raises(compressor.errors.CutError):
        compressor.cut(graph, random_keep(graph), check=refuse)
    attention = model.encoder.layers[0].self_attn
    assert type(attention) is nn.MultiheadAttention
    assert {name: value for name, value in vars(attention).items() if isinstance(value, int)} == {
        name: value for name, value in before.items() if isinstance(value, int)
    }


def test_a_file_gives_the_attention_back(tmp_path) -> None:
    model = shake(Encoder())
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = compressor.trace(model, x)
    compressor.cut(graph, random_keep(graph))
    compressor.save(model, tmp_path / "small.safetensors")
    again = compressor.load(tmp_path / "small.safetensors", factory=lambda: Encoder().double()).eval()
    assert torch.equal(again(x), model.eval()(x))
