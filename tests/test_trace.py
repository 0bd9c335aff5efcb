"""The trace itself: what it finds, what it refuses, and promise 3: no side effects."""

from __future__ import annotations

import copy
import random
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from conftest import shake
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import InputError, TraceError, no_axis_rule

X = torch.randn(1, 3, 32, 32)


def members(graph, name: str) -> set[tuple[str, int, str]]:
    return {(m.tensor, m.dim, m.role) for m in graph[name].members if not m.tensor.startswith("bn")}


def test_the_residual_stage_of_resnet18_is_one_group() -> None:
    graph = compressor.trace(torchvision.models.resnet18(num_classes=10), torch.randn(1, 3, 32, 32))
    group = graph["layer2.0.conv2"]
    producers = {m.tensor for m in group.of_role("producer")}
    consumers = {m.tensor for m in group.of_role("consumer")}
    assert producers == {"layer2.0.conv2.weight", "layer2.0.downsample.0.weight", "layer2.1.conv2.weight"}
    assert consumers == {"layer2.1.conv1.weight", "layer3.0.conv1.weight", "layer3.0.downsample.0.weight"}
    assert graph.sizes() == {
        "conv1": 64, "layer1.0.conv1": 64, "layer1.1.conv1": 64,
        "layer2.0.conv1": 128, "layer2.0.conv2": 128, "layer2.1.conv1": 128,
        "layer3.0.conv1": 256, "layer3.0.conv2": 256, "layer3.1.conv1": 256,
        "layer4.0.conv1": 512, "layer4.0.conv2": 512, "layer4.1.conv1": 512,
    }  # fmt: skip


def test_vgg16_flatten_gives_49_positions_a_channel() -> None:
    graph = compressor.trace(torchvision.models.vgg16(num_classes=10), torch.randn(1, 3, 32, 32))
    (consumer,) = graph["features.28"].of_role("consumer")
    assert (consumer.tensor, consumer.dim, tuple(consumer.positions.shape)) == ("classifier.0.weight", 1, (512, 49))
    assert torch.equal(consumer.positions, torch.arange(512 * 49).view(512, 49))


def test_concatenation_is_an_offset() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    graph = compressor.trace(Cat(), torch.randn(1, 3, 4, 4))
    (consumer,) = graph["b"].of_role("consumer")
    assert torch.equal(consumer.positions.flatten(), torch.arange(4, 10))
    (seen,) = graph["b"].inputs
    assert (seen.module, seen.dim) == ("c", -3)
    assert torch.equal(seen.positions.flatten(), torch.arange(4, 10))


def test_inputs_and_outputs_are_frozen_with_a_reason() -> None:
    graph = compressor.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 4, 4))
    frozen = {(each.tensor, each.dim): each for each in graph.frozen}
    assert set(frozen) == {("0.weight", 1), ("1.weight", 0), ("1.bias", 0)}
    assert "model input" in frozen["0.weight", 1].reason
    assert "aten.convolution in 0" in frozen["0.weight", 1].reason
    assert frozen["1.weight", 0].reason.startswith("model output")
    assert frozen["1.weight", 0].count == 2


def test_an_unknown_operation_freezes_what_reaches_it_and_names_itself() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.renorm(self.a(x), 2, 1, 1.0))

    graph = compressor.trace(Odd(), torch.randn(1, 3, 4, 4))
    (reason,) = {each.reason for each in graph.frozen if each.tensor == "a.weight" and each.dim == 0}
    assert "aten.renorm in the model: no axis rule for this operation, input shape (1, 4, 4, 4)" in reason
    assert graph.groups == ()


def test_a_rule_can_be_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compressor.RULES, "aten.renorm", lambda context, out, x, *rest: context.axes(x))

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.renorm(self.a(x), 2, 1, 1.0))

    assert compressor.trace(Odd(), torch.randn(1, 3, 4, 4)).sizes() == {"a": 4}


def test_a_rule_that_fails_freezes_instead_of_lying(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(context, out, x, *rest):
        raise IndexError("no such axis")

    monkeypatch.setitem(compressor.RULES, "aten.relu", wrong)
    graph = compressor.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 4, 4))
    assert graph.groups == ()
    assert any("its axis rule failed (IndexError: no such axis)" in each.reason for each in graph.frozen)


def test_layer_norm_loses_exactness_and_batch_norm_does_not() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 5)
            self.c, self.d = nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.norm(self.a(x)))))

    graph = compressor.trace(Norm(), torch.randn(2, 3))
    assert {group.name: group.exact for group in graph.groups} == {"a": False, "b": True}


def test_costs_in_closed_form_are_what_is_counted_after_the_cut() -> None:
    from compressor.budget.costs import CostModel

    model = shake(torchvision.models.googlenet(num_classes=10, aux_logits=False, init_weights=False))
    graph = compressor.trace(model, torch.randn(1, 3, 64, 64, dtype=torch.float64))
    costs = CostModel(graph)
    kept = {group.name: max(1, group.size // 3) for group in graph.groups}
    params, macs = costs.params(kept), costs.macs(kept)
    compressor.cut(graph, {name: range(count) for name, count in kept.items()})
    again = compressor.trace(model, graph.example_inputs)
    assert params == sum(p.numel() for p in model.parameters())
    assert macs == CostModel(again).macs(again.sizes())


class Curious(nn.Module):
    """Has everything that a trace might disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()
        self.b = nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.drop(self.bn(self.a(x))).mean((2, 3)) + torch.rand(1))


def test_tracing_has_no_side_effects() -> None:
    model = Curious()
    model.bn.eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    calls = []
    handle = model.a.register_forward_hook(lambda *args: calls.append(None))
    x = torch.randn(1, 3, 8, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state, python, numbers = torch.get_rng_state(), random.getstate(), x.clone()
    fast = torch.backends.mha.get_fastpath_enabled()
    compressor.trace(model, x)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(old, p.grad) for old, p in zip(gradients, model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert torch.equal(x, numbers)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.nn.modules.module._global_forward_hooks == {}
    assert torch.nn.modules.module._global_forward_pre_hooks == {}
    handle.remove()


def test_a_failed_trace_has_no_side_effects_either() -> None:
    model = Curious().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TraceError, match=r"Curious does not run on the example inputs \(1, 4, 8, 8\) at module 'a'"):
        compressor.trace(model, torch.randn(1, 4, 8, 8))
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.nn.modules.module._global_forward_hooks == {}


def test_a_model_that_reads_values_runs_on_real_tensors_and_the_graph_says_so() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(F.relu(h) if h.sum().item() > 0 else h)

    graph = compressor.trace(Reads(), torch.randn(1, 3, 4, 4))
    assert graph.sizes() == {"a": 4}
    assert "ran on real tensors, because without data it failed" in graph.notes[0]
    compressor.cut(graph, {"a": [0, 3]})
    assert graph.sizes() == {"a": 2}


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_inputs_may_be_a_tuple_or_a_dict(form: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"result": self.b(self.a(x) * scale)}

    pair = {"x": torch.randn(1, 3), "scale": torch.randn(1, 1)}
    graph = compressor.trace(Two(), pair if form == "dict" else tuple(pair.values()))
    assert graph.sizes() == {"a": 6}


def test_tracing_allocates_no_activations() -> None:
    """The activation alone would be 10 GB."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 1))
    x = torch.zeros(1, 1, 1, 1).expand(10, 3, 2000, 2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert compressor.trace(model, x).sizes() == {"0": 64}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


@pytest.mark.parametrize("shared", [True, False])
def test_a_mean_is_not_folded_into_a_batch_norm_that_is_not_the_only_reader(shared: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
            self.bn, self.c = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a(x))
            return self.c(self.bn(h) + h if shared else self.bn(h))

    assert ("b.weight" in compressor.trace(Net(), torch.randn(1, 3, 4, 4)).offsets) == (not shared)


def test_what_evaluation_does_not_use_is_said() -> None:
    class Helped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.helper = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return (self.b(h), self.helper(h)) if self.training else self.b(h)

    graph = compressor.trace(Helped(), torch.randn(1, 3, 4, 4))
    assert "2 parameters take no part in evaluation mode (helper.weight, helper.bias)" in graph.notes[0]
    assert "in training these channels reach parameters that evaluation never runs" in graph.notes[1]
    assert graph.sizes() == {}


def test_a_model_without_parameters_has_no_groups() -> None:
    graph = compressor.trace(nn.ReLU(), torch.randn(1, 3, 4, 4))
    assert (graph.groups, graph.frozen, graph.params, graph.macs) == ((), (), (), ())
    compressor.cut(graph, {})


class Unruly(nn.Module):
    """One operation that the graph has no rule for, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.renorm(self.a(x), 2, 1, 1.0))


def test_an_operation_without_a_rule_says_how_to_teach_it(caplog: pytest.LogCaptureFixture) -> None:
    graph = compressor.trace(Unruly(), torch.randn(1, 3, 4, 4))
    message = no_axis_rule("aten.renorm", "", (1, 4, 4, 4))
    assert 'compressor.RULES["aten.renorm"] = my_rule' in message
    assert message in graph.notes
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", message)]
    assert "a" not in graph.sizes()
    assert any("aten.renorm in the model: no axis rule" in each.reason for each in graph.frozen)


def test_a_graph_after_a_cut_is_that_of_the_cut_model() -> None:
    model = torchvision.models.resnet18(num_classes=10)
    graph = compressor.trace(model, X)
    compressor.cut(graph, {group.name: range(0, group.size, 2) for group in graph.groups})
    fresh = compressor.trace(model, X)
    assert graph.sizes() == fresh.sizes()
    for mine, theirs in zip(graph.groups, fresh.groups, strict=True):
        assert [(m.tensor, m.dim, m.role) for m in mine.members] == [(m.tensor, m.dim, m.role) for m in theirs.members]
        assert all(torch.equal(a.positions, b.positions) for a, b in zip(mine.members, theirs.members, strict=True))
    assert graph.recording.sizes == fresh.recording.sizes


def test_what_is_frozen_later_is_logged_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    graph = compressor.trace(torchvision.models.resnet18(num_classes=10), X)
    graph.freeze(["layer1.0.conv1"], "a test")
    note = "group layer1.0.conv1 stays as it is: a test"
    assert graph.notes[-1] == note
    assert caplog.messages[-1] == note


def test_graphs_are_made_in_several_threads_at_once() -> None:
    def made(seed: int) -> dict[str, int]:
        model = nn.Sequential(nn.Conv2d(3, 8 + seed, 3), nn.BatchNorm2d(8 + seed), nn.ReLU(), nn.Conv2d(8 + seed, 4, 1))
        x = torch.zeros(1, 3, 8, 8)
        for _ in range(5):
            model(x.expand(2, -1, -1, -1))
            graph = compressor.trace(model, x)
        compressor.cut(graph, {"0": range(4)})
        return {"first": model[0].out_channels, "left": graph.sizes()["0"]}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made, range(24))) == [{"first": 4, "left": 4}] * 24


def test_a_default_device_is_refused_in_words() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with (
        torch.device("meta"),
        pytest.raises(InputError, match=r"new tensors go to meta by default.*set_default_device\('cpu'\) first"),
    ):
        compressor.trace(model, torch.zeros(1, 3))
