"""Silence and gates against the definition: a channel that no consumer sees, and autograd one sample at a time."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch
from conftest import masked, random_keep, relative_error, shake
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import InputError, RangeError, UnknownNameError
from compressor.graph import ChannelGraph, ConsumerInput, Group, Member
from compressor.relevance.gates import Gates, observable
from compressor.surgery.masks import mask_channels


class Branches(nn.Module):
    """A concatenation (two groups in one input), a group with two consumers, a flatten and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.c = nn.Conv2d(9, 6, 3)
        self.fc, self.last = nn.Linear(6 * 4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.cat([torch.tanh(self.b(x)), self.deep(x)], dim=1)
        x = F.max_pool2d(torch.tanh(self.c(x)), 3)
        return self.last(torch.tanh(self.fc(x.flatten(1))))


@pytest.fixture
def graph() -> ChannelGraph:
    model = shake(Branches())
    return compressor.trace(model.train(), images(2))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def targets(batch: int) -> Tensor:
    return torch.arange(batch) % 3


def ones(graph: ChannelGraph, batch: int) -> Tensor:
    return torch.ones(batch, sum(graph.sizes().values()), dtype=torch.float64)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_the_groups_are_what_this_file_is_about(graph: ChannelGraph) -> None:
    """The depthwise convolution shows its input too, but what it hands on is gated behind it."""
    inputs = {group.name: [seen.module for seen in group.inputs] for group in graph.groups}
    assert inputs == {"a": ["b", "deep", "c"], "b": ["c"], "c": ["fc"], "fc": ["last"]}


# -- masking


def test_masking_is_what_the_oracle_of_cuts_does(graph: ChannelGraph) -> None:
    keep = random_keep(graph)
    expected = masked(graph, keep)(images(2))
    gone = {name: [c for c in range(graph[name].size) if c not in kept.tolist()] for name, kept in keep.items()}
    mask_channels(graph, gone)
    assert torch.equal(graph.model(images(2)), expected)


@torch.no_grad()
def test_masking_equals_the_cut(graph: ChannelGraph) -> None:
    small = compressor.trace(copy.deepcopy(graph.model), images(2))
    compressor.cut(small, {"a": [1, 3], "c": [0]})
    mask_channels(graph, {"a": torch.tensor([0, 2]), "c": [1, 2, 3, 4, 5]})
    assert relative_error(graph.model(images(2)), small.model(images(2))) <= 1e-12


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        ({"a": [0], "bb": [0]}, UnknownNameError, "unknown group 'bb'"),
        ({"a": [0], "b": [5]}, RangeError, r"channel of group 'b' = 5 is out of range: give .* in \[0, 4\]"),
        ({"a": [0], "b": [-1]}, RangeError, "channel of group 'b' = -1"),
        ({"a": [0], "b": torch.ones(5, dtype=torch.bool)}, InputError, r"came as a mask: give their indices"),
    ],
)
def test_masking_refuses_and_writes_nothing(graph: ChannelGraph, channels, error: type, message: str) -> None:
    before = copy.deepcopy(graph.model.state_dict())
    with pytest.raises(error, match=message):
        mask_channels(graph, channels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.model.state_dict().items())


# -- gates forwards


def test_gates_of_one_change_no_bit(graph: ChannelGraph) -> None:
    expected = graph.model(images(5))
    for exclude in ("zero", "mean", "linear"):
        with Gates(graph, exclude=exclude).applied(ones(graph, 5)) as reached:
            assert torch.equal(graph.model(images(5)), expected)
        assert reached == {"b", "c", "fc", "last"}


@torch.no_grad()
def test_gates_of_zero_mask_every_sample_for_itself(graph: ChannelGraph) -> None:
    gates = (torch.rand(6, 22) < 0.5).double()
    with Gates(graph).applied(gates):
        out = graph.model(images(6))
    for sample in range(6):
        keep = {name: part.nonzero().flatten() for name, part in Gates(graph).split(gates[sample]).items()}
        expected = masked(graph, keep)(images(6)[sample : sample + 1])
        assert relative_error(out[sample : sample + 1], expected) <= 1e-12


@torch.no_grad()
def test_only_the_chosen_groups_are_gated(graph: ChannelGraph) -> None:
    gates = Gates(graph, ["b"])
    assert gates.sizes == {"b": 5}
    with gates.applied(torch.zeros(2, 5, dtype=torch.float64)):
        out = graph.model(images(2))
    expected = masked(graph, {"b": torch.zeros(0, dtype=torch.int64)})(images(2))
    assert relative_error(out, expected) <= 1e-12


@torch.no_grad()
def test_exclusion_towards_the_mean_puts_the_running_mean_in_place(graph: ChannelGraph) -> None:
    seen: list[Tensor] = []
    graph.model.c.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    graph.model(images(4))
    gate = torch.ones(4, 5, dtype=torch.float64)
    gate[1, 2] = 0.0
    gate[2, 3] = 0.25
    gates = Gates(graph, ["b"], exclude="mean")
    with gates.applied(gate):
        graph.model(images(4))
    before, mean = seen[0], seen[0].mean((0, 2, 3))
    assert gates.means()["c.weight"] == pytest.approx(mean.detach())
    expected = before.clone()
    expected[1, 2] = mean[2]
    expected[2, 3] = mean[3] + 0.25 * (before[2, 3] - mean[3])
    # The hook of this test was there first: look at what the convolution made of it.
    with gates.applied(gate):
        out = graph.model.c(before)
    assert relative_error(out, F.conv2d(expected, graph.model.c.weight, graph.model.c.bias)) <= 1e-12


@torch.no_grad()
def test_exclusion_towards_the_prediction_puts_what_the_others_say_in_place(graph: ChannelGraph) -> None:
    seen: list[Tensor] = []
    graph.model.c.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    graph.model(images(40))
    before = seen[0]
    gate = torch.ones(40, 5, dtype=torch.float64)
    gate[1, 2] = 0.0
    gate[2, 3] = 0.25
    gates = Gates(graph, ["b"], exclude="linear")
    with gates.applied(gate):
        graph.model(images(40))
    rows = before[:, :5].movedim(1, -1).flatten(0, -2)
    rows = rows - rows.mean(0)
    expected = before.clone()
    for sample, channel, u in ((1, 2, 0.0), (2, 3, 0.25)):
        others = [each for each in range(5) if each != channel]
        # The ridge in units of every channel's variance: as many rows of noise as channels.
        x, y = rows[:, others], rows[:, channel]
        ridge = 5 * x.square().mean(0).diag()
        coefficients = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
        centred = before[sample, :5] - before[:, :5].mean((0, 2, 3)).view(-1, 1, 1)
        left = centred[channel] - torch.einsum("chw,c->hw", centred[others], coefficients)
        expected[sample, channel] = before[sample, channel] - (1 - u) * left
    with gates.applied(gate):
        out = graph.model.c(before)
    assert relative_error(out, F.conv2d(expected, graph.model.c.weight, graph.model.c.bias)) <= 1e-10


def test_a_copy_and_a_sum_are_excluded_without_a_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3)).double().train()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = model[0].weight[0], model[0].bias[0]
        model[0].weight[3] = model[0].weight[0] - 2 * model[0].weight[1]
    graph = compressor.trace(model, images(2))
    expected = model(images(300))
    for out in ([2], [3], [0]):
        gate = torch.ones(300, 4, dtype=torch.float64)
        gate[:, out] = 0
        errors = []
        for exclude in ("linear", "mean"):
            with Gates(graph, exclude=exclude).applied(gate):
                errors.append(relative_error(model(images(300)), expected))
        assert errors[0] < 2e-3  # its ridge is 4 / 24,300
        assert errors[1] > 0.05


@torch.no_grad()
def test_where_nothing_takes_a_mean_exclusion_leaves_what_the_cut_does() -> None:
    """Behind a convolution without bias a removed channel is gone with its mean; the rest predict it about zero."""
    model = shake(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 3, bias=False))).train()
    graph = compressor.trace(model, images(2))
    gate = torch.ones(50, 5, dtype=torch.float64)
    gate[:, 1] = 0
    others = torch.tensor([0, 2, 3, 4])
    found = {}
    for exclude in ("zero", "mean", "linear"):
        with Gates(graph, exclude=exclude).applied(gate):
            found[exclude] = model(images(50))
    assert torch.equal(found["mean"], found["zero"])
    h = model[0](images(50))
    rows = h.movedim(1, -1).flatten(0, -2)
    x, y = rows[:, others], rows[:, 1]
    ridge = 5 * x.square().mean(0).diag()  # in units of every channel's square: as many rows of noise as channels
    coefficients = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    h[:, 1] = torch.einsum("bchw,c->bhw", h[:, others], coefficients)
    assert relative_error(found["linear"], model[1](h)) <= 1e-10
    assert relative_error(found["zero"], found["linear"]) > 0.01


def test_the_mean_is_running_and_that_of_every_position(graph: ChannelGraph) -> None:
    gates = Gates(graph, half_life=2.0)
    assert gates.means() == {}
    for x in (images(4), -images(4)):
        with gates.applied(ones(graph, 4)):
            graph.model(x)
    inputs: list[Tensor] = []
    graph.model.fc.register_forward_pre_hook(lambda module, h: inputs.append(h[0].mean(0)))
    graph.model(images(4))
    graph.model(-images(4))
    old, decay = inputs[0], 0.5**0.5
    assert gates.means()["fc.weight"].shape == (24,)
    assert gates.means()["fc.weight"] == pytest.approx(((decay * old + inputs[1]) / (decay + 1)).detach())


# -- gates backwards


@pytest.mark.parametrize("exclude", ["zero", "mean"])
def test_gate_gradients_are_those_of_every_sample_alone(graph: ChannelGraph, exclude: str) -> None:
    """Sum over space, over several consumers and over shared inputs: against autograd, one sample at a time."""
    gate = torch.rand(5, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = gate.clone().requires_grad_()
    gates = Gates(graph, exclude=exclude)
    with gates.applied(together):
        F.cross_entropy(graph.model(images(5)), targets(5)).backward()
    means = gates.means()
    for sample in range(5):
        one = gate[sample].clone().requires_grad_()
        out = by_hand(graph, one, images(5)[sample : sample + 1], means if exclude == "mean" else None)
        F.cross_entropy(out, targets(5)[sample : sample + 1]).backward()
        assert relative_error(5 * together.grad[sample], one.grad) <= 1e-12


def test_gradients_by_gates_of_predicted_channels_are_those_of_every_sample_alone(graph: ChannelGraph) -> None:
    gates = Gates(graph, exclude="linear", track_every=1000)
    with gates.applied(ones(graph, 40)):
        graph.model(images(40))  # what is known of the inputs stays as it is from here on
    gate = torch.rand(5, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = gate.clone().requires_grad_()
    with gates.applied(together):
        F.cross_entropy(graph.model(images(5)), targets(5)).backward()
    for sample in range(5):
        one = gate[sample : sample + 1].clone().requires_grad_()
        with gates.applied(one):
            F.cross_entropy(graph.model(images(5)[sample : sample + 1]), targets(5)[sample : sample + 1]).backward()
        assert relative_error(5 * together.grad[sample], one.grad[0]) <= 1e-12


def by_hand(graph: ChannelGraph, gate: Tensor, x: Tensor, means: dict[str, Tensor] | None) -> Tensor:
    """The forward pass of `Branches` with its gates written out, one sample."""
    net = graph.model
    u = dict(zip("abcf", gate.split([4, 5, 6, 7]), strict=True))

    def at(h: Tensor, u: Tensor, weight: str) -> Tensor:
        shape = (1, -1, 1, 1) if h.dim() == 4 else (1, -1)
        mean = means[weight].view(shape) if means else 0.0
        return mean + u.view(shape) * (h - mean)

    a = torch.tanh(net.a(x))
    b = torch.tanh(net.b(at(a, u["a"], "b.weight")))
    c = torch.tanh(net.c(at(torch.cat([b, net.deep(a)], 1), torch.cat([u["b"], u["a"]]), "c.weight")))
    flat = F.max_pool2d(c, 3).flatten(1)
    return net.last(at(torch.tanh(net.fc(at(flat, u["c"].repeat_interleave(4), "fc.weight"))), u["f"], "last.weight"))


def test_parameters_get_the_gradients_of_the_gated_model(graph: ChannelGraph) -> None:
    gate = torch.rand(1, 22, dtype=torch.float64)
    with Gates(graph).applied(gate):
        graph.model(images(1)).sum().backward()
    gated = [parameter.grad.clone() for parameter in graph.model.parameters()]
    graph.model.zero_grad()
    by_hand(graph, gate[0], images(1), None).sum().backward()
    for mine, parameter in zip(gated, graph.model.parameters(), strict=True):
        assert relative_error(mine, parameter.grad) <= 1e-12


def test_frozen_layers_before_a_consumer_do_not_hide_its_gates(graph: ChannelGraph) -> None:
    for parameter in graph.model.parameters():
        parameter.requires_grad_(False)
    gate = torch.rand(2, 22, dtype=torch.float64).requires_grad_()
    with Gates(graph).applied(gate):
        graph.model(images(2)).sum().backward()
    assert int((gate.grad == 0).sum()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_work_under_autocast(dtype: torch.dtype) -> None:
    model = Branches().train()
    graph = compressor.trace(model, images(2).float())
    gate, expected = (torch.full((4, 22), 0.5).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=dtype), Gates(graph).applied(gate):
        out = model(images(4).float())
    F.cross_entropy(out.float(), targets(4), reduction="sum").backward()
    with Gates(graph).applied(expected):
        F.cross_entropy(model(images(4).float()), targets(4), reduction="sum").backward()
    assert out.dtype == dtype
    assert gate.grad.dtype == torch.float32
    assert relative_error(gate.grad, expected.grad) < 0.02


def test_channels_last_stays_so(graph: ChannelGraph) -> None:
    h = torch.randn(2, 9, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    seen = []
    with Gates(graph).applied(torch.rand(2, 22, dtype=torch.float64)):
        graph.model.c.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        graph.model.c(h)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(seen[0], h)


def test_what_a_layer_saves_is_made_again_for_its_backward_pass() -> None:
    """So it cannot be, and is not, where the input was changed meanwhile."""
    layer = nn.Linear(4, 2)
    model = nn.Sequential(nn.Linear(4, 4), layer).train()
    graph = compressor.trace(model, torch.zeros(2, 4))
    h = torch.randn(3, 4)
    with Gates(graph).applied(torch.rand(3, 4)):
        out = layer(h)
    h.zero_()
    with pytest.raises(RuntimeError, match="modified in place before its backward pass"):
        out.sum().backward()


@pytest.mark.parametrize("hooked", [False, True])
def test_gated_inputs_share_memory_only_where_nobody_sees_it(hooked: bool) -> None:
    """Two layers of the same shape, one after the other; a hook of the user's sees inputs and gradients that stay."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)]).double().train()
    graph = compressor.trace(model, torch.zeros(1, 4, 5, 5, dtype=torch.float64))
    gates, inputs, gradients = Gates(graph), [], []
    remove = [
        handle.remove
        for layer in model[1:]
        if hooked
        for handle in (
            layer.register_forward_hook(lambda module, inputs_, output: inputs.append(inputs_[0])),
            layer.register_full_backward_hook(lambda module, by_input, by_output: gradients.append(by_input[0])),
        )
    ]
    rows = torch.rand(2, sum(gates.sizes.values()), dtype=torch.float64)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with gates.applied(rows.requires_grad_()):
        model(x).square().sum().backward()
    for each in remove:
        each()
    u, h, kept = rows.detach().clone().requires_grad_(), model[0](x), []
    for layer, gate in zip(model[1:], u.split(4, dim=1), strict=True):
        kept.append(gate[:, :, None, None] * h)
        kept[-1].retain_grad()
        h = layer(kept[-1])
    mine = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    h.square().sum().backward()
    assert relative_error(rows.grad, u.grad) <= 1e-12
    for grad, parameter in zip(mine, model.parameters(), strict=True):
        assert relative_error(grad, parameter.grad) <= 1e-12
    for seen, expected in zip(inputs, kept, strict=hooked):
        assert relative_error(seen.detach(), expected.detach()) <= 1e-12
    for seen, expected in zip(reversed(gradients), kept, strict=hooked):
        assert relative_error(seen, expected.grad) <= 1e-12


def test_means_are_taken_in_a_part_of_the_passes(graph: ChannelGraph) -> None:
    gates, often = Gates(graph, track_every=3, half_life=6.0), Gates(graph, half_life=2.0)
    for number in range(6):
        x = (1 + number) * images(4)
        with gates.applied(ones(graph, 4)):
            graph.model(x)
        if number % 3 == 0:
            with often.applied(ones(graph, 4)):
                graph.model(x)
    for weight, mean in often.means().items():
        assert gates.means()[weight] == pytest.approx(mean.detach())


# -- what is left behind


def test_no_masks_in_evaluation_mode(graph: ChannelGraph) -> None:
    graph.model.eval()
    expected = graph.model(images(3))
    gates = Gates(graph)
    with gates.applied(torch.zeros(2, 22, dtype=torch.float64)) as reached:
        assert torch.equal(graph.model(images(3)), expected)
    assert (reached, gates.means()) == (set(), {})


def test_hooks_are_gone_after_an_exception(graph: ChannelGraph) -> None:
    state = copy.deepcopy(graph.model.state_dict())
    during = 0
    with contextlib.suppress(RuntimeError), Gates(graph).applied(ones(graph, 2)):
        during = hooks(graph.model)
        raise RuntimeError
    assert (during, hooks(graph.model)) == (8, 0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in graph.model.state_dict().items())


def test_hooks_are_gone_when_the_model_itself_fails(graph: ChannelGraph) -> None:
    with pytest.raises(RuntimeError, match="channels"), Gates(graph).applied(ones(graph, 2)):
        graph.model(images(2)[:, :1].repeat(1, 7, 1, 1))
    assert hooks(graph.model) == 0


def test_an_input_of_another_batch_is_left_alone_and_said(graph: ChannelGraph) -> None:
    gates = Gates(graph)
    with gates.applied(torch.zeros(2, 22, dtype=torch.float64)) as reached:
        graph.model(images(3))
    assert reached == set()
    assert gates.unseen.keys() == gates.sizes.keys()
    assert all("batch of 2 samples first" in reason for reason in gates.unseen.values())


# -- cuts and checkpoints


def test_means_follow_a_cut(graph: ChannelGraph) -> None:
    gates = Gates(graph)
    with gates.applied(ones(graph, 4)):
        graph.model(images(4))
    before = gates.means()
    keep = {"a": torch.tensor([0, 2]), "b": torch.tensor([1, 2, 4]), "c": torch.tensor([5])}
    compressor.cut(graph, keep)
    after = gates.narrowed(keep, graph)
    assert after.sizes == {"a": 2, "b": 3, "c": 1, "fc": 7}
    assert torch.equal(after.means()["c.weight"], before["c.weight"][[1, 2, 4, 5, 7]])
    assert torch.equal(after.means()["fc.weight"], before["fc.weight"][20:])
    assert torch.equal(after.means()["last.weight"], before["last.weight"])
    with after.applied(ones(graph, 4)):
        graph.model(images(4))


@torch.no_grad()
def test_means_are_what_a_cut_folds(graph: ChannelGraph) -> None:
    """For a Linear consumer and a constant channel, folding its mean makes the cut change nothing."""
    graph.model.fc.weight[2] = 0.0
    expected = graph.model(images(4))
    gates = Gates(graph)
    with gates.applied(ones(graph, 4)):
        graph.model(images(4))
    compressor.cut(graph, {"fc": [0, 1, 3, 4, 5, 6]}, means=gates.means())
    assert relative_error(graph.model(images(4)), expected) <= 1e-12


def test_means_resume(graph: ChannelGraph) -> None:
    gates, resumed = Gates(graph), Gates(graph)
    with gates.applied(ones(graph, 4)):
        graph.model(images(4))
    resumed.load_state_dict(gates.state_dict())
    for each in (gates, resumed):
        with each.applied(ones(graph, 2)):
            graph.model(images(2))
    assert all(torch.equal(mean, resumed.means()[weight]) for weight, mean in gates.means().items())


# -- refusals


def by_hand_group(inputs: tuple[ConsumerInput, ...]) -> ChannelGraph:
    rows = torch.arange(4).unsqueeze(1)
    members = (Member("a.weight", 0, rows, "producer"), Member("b.weight", 1, rows, "consumer"))
    return ChannelGraph(Branches(), images(1), (Group("a", 4, members, inputs),), ())


def test_a_group_with_an_unseen_consumer_is_not_observable() -> None:
    rows = torch.arange(4).unsqueeze(1)
    assert observable(by_hand_group((ConsumerInput("b.weight", -3, rows),))["a"])
    blind = by_hand_group(())
    assert not observable(blind["a"])
    with pytest.raises(InputError, match=r"group 'a' cannot be watched: .*\(b\.weight\).*criterion l1"):
        Gates(blind, ["a"])
    with pytest.raises(InputError, match="no group to watch"):
        Gates(blind)


def test_unknown_groups_are_refused(graph: ChannelGraph) -> None:
    with pytest.raises(UnknownNameError, match="unknown group 'x'"):
        Gates(graph, ["x"])


@pytest.mark.parametrize(
    ("call", "came"),
    [
        (lambda module: module(input=torch.zeros(2, 4, 5, 5)), "NoneType instead of a tensor"),
        (lambda module: module(torch.zeros(3, 4, 5, 5)), r"shape \(3, 4, 5, 5\), and a batch of 2 samples"),
        (lambda module: module(torch.zeros(4, 5, 5)), r"shape \(4, 5, 5\)"),
        (lambda module: module(torch.zeros(2, 3, 5, 5)), "with at least 4 channels on dimension -3"),
    ],
)
def test_inputs_of_another_layout_are_left_alone_and_said(call, came: str) -> None:
    graph = by_hand_group((ConsumerInput("b.weight", -3, torch.arange(4).unsqueeze(1)),))
    gates = Gates(graph)
    with gates.applied(torch.zeros(2, 4)) as reached, contextlib.suppress(RuntimeError):  # of too few channels
        call(graph.model.b)
    assert reached == set()
    (reason,) = gates.unseen.values()
    assert re.search(came, reason)


def test_a_weight_that_another_module_reads_too_cannot_be_gated() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.first(h) + self.second(h.flip(3))

    graph = compressor.trace(Tied().double().train(), images(2))
    (group,) = graph.groups
    assert not observable(group)
    with pytest.raises(InputError, match=r"cannot be watched: not every consumer \(first.weight\) is a module"):
        Gates(graph, ["a"])
