"""Every rule against index arrays that were computed by hand: which positions are one channel, and what is frozen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import masked, random_keep, relative_error
from rule_cases import CASES, Case, Net
from torch import Tensor, nn

import compressor
from compressor.errors import CutError
from compressor.graph import ChannelGraph

# Cases with a size in their own code, which no cut can follow, and those in which half of two is one: without a second
# channel or head PyTorch copies no memory, and the check of a cut refuses other operations than before.
REFUSED = {
    "_reshape_alias keeps",
    "view in blocks and back",
    "unflatten and sum",
    "shuffle by hand",
    "split in equal parts",
    "unsafe_split",
    "narrow",
    "reshape, whole",
    "unflatten and flatten, whole",
    "grouped and transposed",
}
# Cases whose output is random, memory that was never written, or not a number; and those that do not run on a CPU.
NO_ORACLE = {
    *(f"{op} keeps" for op in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")),
    *(f"{op} keeps" for op in ("bernoulli", "exponential", "normal", "uniform", "rand", "randn", "rand_like")),
    "randn_like keeps",
    "acosh keeps",
    "fractional_max_pool2d beside channels",
    "cudnn_batch_norm",
    "on a GPU",
    "on any GPU",
}


@contextlib.contextmanager
def default_double() -> Iterator[None]:
    """New tensors are in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def traced(name: str) -> tuple[Case, ChannelGraph]:
    case = CASES[name]
    return case, compressor.trace(as_run(case.model, case), torch.zeros(case.shape))


def as_run(model: nn.Module, case: Case) -> nn.Module:
    """Return the model, one that runs in inference mode where the case asks for whole operations."""
    if not case.whole:
        return model
    model = copy.copy(model)
    model.__class__ = Whole
    return model


class Whole(Net):
    forward = torch.inference_mode()(Net.forward)


@pytest.mark.parametrize("name", CASES)
def test_channels_are_where_they_were_computed_to_be(name: str) -> None:
    case, graph = traced(name)
    assert case.rules <= {record.op for record in graph.recording.log.records}
    found = {g.name: {f"{m.tensor}.{m.dim}": m.positions.tolist() for m in g.members} for g in graph.groups}
    assert found == case.groups
    assert any("ran on real tensors" in note for note in graph.notes) == case.real


@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_says_why(name: str) -> None:
    case, graph = traced(name)
    cut = {key for members in case.groups.values() for key in members}
    frozen = {f"{each.tensor}.{each.dim}": each.reason for each in graph.frozen}
    assert set(frozen) - ({"a.weight.1", "b.weight.0"} - cut) == set(case.frozen)
    assert [key for key, why in case.frozen.items() if why not in frozen[key]] == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups])
def test_a_group_is_exact_unless_channels_are_mixed_without_a_weight(name: str) -> None:
    case, graph = traced(name)
    inexact = tuple(case.groups) if case.inexact is True else case.inexact or ()
    assert {group.name: group.exact for group in graph.groups} == {key: key not in inexact for key in case.groups}


def positive(model: nn.Module) -> nn.Module:
    """Return a copy in double precision whose weights are positive and small: then logarithms and roots are numbers."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.05, 0.3)
    return model


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups and case.inexact is not True])
def test_a_cut_of_exact_groups_is_its_mask(name: str) -> None:
    case = CASES[name]
    model, x = as_run(positive(case.model), case), torch.rand(case.shape, dtype=torch.float64)
    with torch.no_grad(), default_double():
        graph = compressor.trace(model, x)
        keep = {name: kept for name, kept in random_keep(graph).items() if graph[name].exact}
        if name in REFUSED:
            with pytest.raises(CutError):
                compressor.cut(graph, keep)
            return
        wanted = None if name in NO_ORACLE else masked(graph, keep)(x)
        compressor.cut(graph, keep)
        assert name in NO_ORACLE or relative_error(model(x), wanted) <= 1e-12


def test_every_rule_has_a_case() -> None:
    covered = set().union(*(case.rules for case in CASES.values()))
    assert covered == set(compressor.RULES)


EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda z: z.sum(1, keepdim=True),
    "norm": lambda z: z.norm(dim=1, keepdim=True),
    "softmax": lambda z: z.softmax(1).amax(1, keepdim=True),
    "cumsum": lambda z: z.cumsum(1).amax(1, keepdim=True),
    "product": lambda z: (z.flatten(2).transpose(1, 2) @ z.flatten(2)).mean((1, 2)),
    "copies": lambda z: z[:, :1].repeat(1, z.shape[1], 1, 1).sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_a_sum_over_as_many_copies_as_there_are_channels_refuses_a_cut(name: str) -> None:
    """An expanded dimension fits whatever it meets; what is summed over it depends on how long it is."""
    net = Net(
        lambda n, x: n.b(h := n.a(x)) + EXPANDED[name](n.z(x).expand(-1, h.shape[1], -1, -1)),
        **{key: nn.Conv2d(i, o, 1) for key, i, o in (("a", 3, 4), ("b", 4, 2), ("z", 3, 1))},
    )
    graph = compressor.trace(net, torch.zeros(1, 3, 4, 4))
    with pytest.raises(CutError, match=r"a size (that was|of)"):
        compressor.cut(graph, {"a": torch.tensor([0, 1])})
