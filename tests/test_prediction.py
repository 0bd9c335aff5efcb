"""Linear compensation: a channel that the others determine is cut without a trace, wherever it is read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import relative_error, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from test_surgery import same
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import InputError
from compressor.surgery import Moments, input_moments, verified_cut

SIZE = 8


class Reader(nn.Module):
    """Eight channels from a 1x1 convolution, and something that reads them."""

    def __init__(self, read: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.write = nn.Conv2d(3, SIZE, 1)
        self.read = read
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, self.write(x))


READERS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: Reader(lambda m, h: m.a(h), a=nn.Conv2d(SIZE, 5, 1)),
    "3x3, unpadded": lambda: Reader(lambda m, h: m.a(h), a=nn.Conv2d(SIZE, 5, 3)),
    "strided, dilated": lambda: Reader(lambda m, h: m.a(h), a=nn.Conv2d(SIZE, 5, 3, stride=2, dilation=2)),
    "BatchNorm": lambda: Reader(lambda m, h: m.n(m.a(h)), a=nn.Conv2d(SIZE, 5, 3, bias=False), n=nn.BatchNorm2d(5)),
    "blocks": lambda: Reader(lambda m, h: m.a(torch.cat([h, h], 1)), a=nn.Conv2d(2 * SIZE, 6, 3, groups=2)),
    "Linear": lambda: Reader(lambda m, h: m.a(h.mean((2, 3))), a=nn.Linear(SIZE, 5)),
    "Linear over space": lambda: Reader(lambda m, h: m.a(h.movedim(1, -1).contiguous()), a=nn.Linear(SIZE, 5)),
    # torch computes these as a product and a sum: their input does not lie in one piece.
    "Linear, permuted": lambda: Reader(lambda m, h: m.a(h.movedim(1, -1)), a=nn.Linear(SIZE, 5)),
    "Linear, patches": lambda: Reader(lambda m, h: m.a(h.flatten(2).transpose(1, 2)), a=nn.Linear(SIZE, 5)),
    "flattened": lambda: Reader(lambda m, h: m.a(h.flatten(1)), a=nn.Linear(SIZE * 36, 5)),
    "two readers": lambda: Reader(lambda m, h: m.a(h) + m.b(h), a=nn.Conv2d(SIZE, 5, 1), b=nn.Conv2d(SIZE, 5, 1)),
    "beside others": lambda: Reader(
        lambda m, h: m.a(torch.cat([m.c(h), h], 1)), c=nn.Conv2d(SIZE, 4, 1), a=nn.Conv2d(SIZE + 4, 5, 1)
    ),
    "shuffled": lambda: Reader(
        lambda m, h: m.a(F.channel_shuffle(torch.cat([h, h], 1), 2)), a=nn.Conv2d(2 * SIZE, 5, 1)
    ),
    "pooled": lambda: Reader(lambda m, h: m.a(F.avg_pool2d(h, 2)), a=nn.Conv2d(SIZE, 5, 1)),
    "1d": lambda: Reader(lambda m, h: m.a(h.flatten(2)), a=nn.Conv1d(SIZE, 5, 3)),
    "3d": lambda: Reader(lambda m, h: m.a(h.unsqueeze(2)), a=nn.Conv3d(SIZE, 5, 1)),
}  # fmt: skip


def images(count: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=generator)


def redundant(make: Callable[[], nn.Module]) -> nn.Module:
    """Three input channels determine all eight; channel 0 to 2 do so too, whatever the weights are."""
    torch.manual_seed(0)
    return shake(make())


@pytest.mark.parametrize("name", READERS)
def test_what_the_others_determine_is_cut_without_a_trace(name: str) -> None:
    model = redundant(READERS[name])
    graph = compressor.trace(model, images(1))
    moments = input_moments(graph, [images(20), images(20, seed=1)])
    fresh = images(10, seed=2)
    with torch.no_grad():
        expected = model(fresh)
        verified_cut(graph, {"write": torch.tensor([0, 2, 4, 7])}, fresh, means=moments)
        assert model.write.out_channels == 4
        assert relative_error(model(fresh), expected) < 1e-10


def test_by_the_mean_alone_it_is_not() -> None:
    model = redundant(READERS["1x1"])
    graph = compressor.trace(model, images(1))
    with torch.no_grad():
        expected = model(images())
        compressor.cut(graph, {"write": [0, 2, 4, 7]}, means=input_moments(graph, [images()]).means)
        assert relative_error(model(images()), expected) > 1e-2


def test_covariances_are_those_of_all_samples_and_places() -> None:
    model = redundant(READERS["3x3, unpadded"])
    with torch.no_grad():
        model.write.bias += 1e4  # far from zero, where sums of squares would drown the variances
    found = input_moments(compressor.trace(model, images(1)), [images(7), images(5, seed=1)])
    with torch.no_grad():
        rows = model.write(torch.cat([images(7), images(5, seed=1)])).movedim(1, -1).flatten(0, -2)
    wanted = torch.cov(rows.T, correction=0)
    torch.testing.assert_close(found.covariances["a.weight", "write"], wanted.unsqueeze(0), rtol=1e-9, atol=1e-9)
    assert found.samples == 12


def test_pixels_that_a_flatten_laid_side_by_side_are_counted_together() -> None:
    model = redundant(READERS["flattened"])
    found = input_moments(compressor.trace(model, images(1)), [images()])
    with torch.no_grad():
        h = model.write(images()).flatten(2)
    rows = (h - h.mean(0)).movedim(1, -1).flatten(0, 1)
    wanted = rows.T @ rows / len(rows)
    torch.testing.assert_close(found.covariances["a.weight", "write"][0], wanted, rtol=1e-9, atol=1e-12)
    assert found.means["a.weight"].shape == (SIZE * 36,)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.sets(st.integers(0, SIZE - 1), min_size=1, max_size=SIZE - 1))
def test_on_its_own_data_a_prediction_loses_no_more_than_the_mean(seed: int, keep: set[int]) -> None:
    torch.manual_seed(seed)
    model = shake(Reader(lambda m, h: m.a(torch.tanh(h)), a=nn.Conv2d(SIZE, 5, 1)), seed)
    errors = []
    for known in (lambda moments: moments, lambda moments: moments.means):
        smaller = copy.deepcopy(model)
        graph = compressor.trace(smaller, images(1))
        compressor.cut(graph, {"write": sorted(keep)}, means=known(input_moments(graph, [images()])))
        with torch.no_grad():
            errors.append(float((smaller(images()) - model(images())).square().mean()))
    # Five outputs, each a sum over what goes: least squares of the channels is not that of a sum, but nearly.
    assert errors[0] <= errors[1] * 1.05 + 1e-20


def test_noise_is_not_predicted() -> None:
    torch.manual_seed(0)
    model = shake(Reader(lambda m, h: m.a(h.mean((2, 3))), a=nn.Linear(SIZE, 5)))
    graph = compressor.trace(model, images(1))
    noise = torch.randn(20, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = torch.cov(noise.T, correction=0)
    means = {"a.weight": torch.zeros(SIZE, dtype=torch.float64)}
    before = model.a.weight.detach().clone()
    compressor.cut(graph, {"write": [0, 1, 2, 3]}, means=Moments(means, {("a.weight", "write"): covariance[None]}, 20))
    plain = before[:, 4:] @ torch.linalg.solve(covariance[:4, :4], covariance[:4, 4:]).T
    assert (model.a.weight - before[:, :4]).norm() < 0.6 * plain.norm()


# -- everything that belongs to a weight follows


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_momentum_and_copies_move_by_the_same_map(kind: type[torch.optim.Optimizer]) -> None:
    model = redundant(READERS["1x1"])
    average = copy.deepcopy(model)
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **settings)
    for seed in range(3):
        optimizer.zero_grad()
        model(images(seed=seed)).square().mean().backward()
        optimizer.step()
    graph = compressor.trace(model, images(1))
    moments = input_moments(graph, [images()])
    weight, gradient = model.a.weight.detach().clone(), model.a.weight.grad.clone()
    state = {name: each.clone() for name, each in optimizer.state[model.a.weight].items() if each.dim()}
    of_average = average.a.weight.detach().clone()
    kept, gone = [0, 2, 4, 7], [1, 3, 5, 6]
    c = moments.covariances["a.weight", "write"][0]
    matrix = torch.linalg.lstsq(c[kept][:, kept], c[kept][:, gone]).solution.T
    compressor.cut(graph, {"write": kept}, optimizer, moments, copies=[average])

    def moved(tensor: Tensor) -> Tensor:
        return tensor[:, kept] + torch.einsum("orij,rn->onij", tensor[:, gone], matrix)

    after = optimizer.state[model.a.weight]
    first = "momentum_buffer" if kind is torch.optim.SGD else "exp_avg"
    for now, before in ((model.a.weight, weight), (average.a.weight, of_average), (after[first], state[first])):
        # Three of the kept four determine the fourth, so A is one of many: what it makes of the inputs is the same.
        with torch.no_grad():
            h = model.write(images())
            torch.testing.assert_close(F.conv2d(h - h.mean((0, 2, 3), keepdim=True), now),
                                       F.conv2d(h - h.mean((0, 2, 3), keepdim=True), moved(before)))  # fmt: skip
    assert torch.equal(model.a.weight.grad, gradient[:, kept])
    if "exp_avg_sq" in state:
        assert torch.equal(after["exp_avg_sq"], state["exp_avg_sq"][:, kept])


def test_a_cut_that_is_taken_back_leaves_weights_and_momentum() -> None:
    model = redundant(READERS["1x1"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images()).square().mean().backward()
    optimizer.step()
    graph = compressor.trace(model, images(1))
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

    def refuse() -> None:
        raise RuntimeError("taken back")

    with pytest.raises(RuntimeError, match="taken back"):
        compressor.cut(graph, {"write": [0, 1]}, optimizer, input_moments(graph, [images()]), check=refuse)
    assert same(model.state_dict(), before)
    assert same(optimizer.state_dict()["state"][2], state["state"][2])


# -- through prune and Pruner


def test_prune_predicts_where_there_is_calibration() -> None:
    model = redundant(READERS["3x3, unpadded"])
    with torch.no_grad():
        expected = model(images())
        result = compressor.prune(
            model, images(1), "l1", compressor.Budget(0.5, "channels"), calibration=[images()], verify=True
        )
        assert result.reached
        assert relative_error(model(images()), expected) < 1e-10


def test_a_pruner_predicts_over_its_calibration() -> None:
    model = redundant(READERS["1x1"]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = compressor.Pruner(
        model, images(1), "l1", compressor.Budget(0.5, "channels"), optimizer=optimizer, total_steps=10, prune_every=1,
        calibration=[images()],
    )  # fmt: skip
    with torch.no_grad():
        expected = model(images())
    for _ in range(10):
        pruner.loss(images(), torch.zeros(40, 6, 6, dtype=torch.int64), F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert model.write.out_channels == 4
    assert relative_error(model(images()), expected) < 1e-10


def test_relevance_predicts_as_well_while_it_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten(2), nn.AvgPool1d(4), nn.Flatten()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = compressor.Pruner(
        model, images(1).float(), "relevance", 0.3, optimizer=optimizer, total_steps=60, calibration=[images().float()]
    )
    events = []
    for seed in range(60):
        pruner.loss(images(40, seed).float(), torch.arange(40) % 4, F.cross_entropy).backward()
        optimizer.step()
        events.append(pruner.step())
        optimizer.zero_grad()
    assert pruner.result().reached
    assert any(events)


@pytest.mark.parametrize(("is_alone", "offsets"), [(True, {"weight"}), (False, set())])
def test_a_bias_added_to_a_product_stands_in_for_it_alone(is_alone: bool, offsets: set[str]) -> None:
    class Product(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.t()
            return y + self.bias if is_alone else (y + self.bias) * y

    graph = compressor.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), Product(8, 5)), torch.zeros(2, 3))
    assert {name.removeprefix("2.") for name in graph.offsets if name.startswith("2.")} == offsets


# -- consumers without a bias, a running mean, or a covariance


OFFSETLESS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: Reader(lambda m, h: m.a(h), a=nn.Conv2d(SIZE, 5, 1, bias=False)),
    "3x3, padded": lambda: Reader(lambda m, h: m.a(h), a=nn.Conv2d(SIZE, 5, 3, padding=1, bias=False)),
    "blocks": lambda: Reader(lambda m, h: m.a(torch.cat([h, h], 1)), a=nn.Conv2d(2 * SIZE, 6, 1, groups=2, bias=False)),
    "transposed": lambda: Reader(lambda m, h: m.a(h), a=nn.ConvTranspose2d(SIZE, 5, 3, bias=False)),
    "Linear": lambda: Reader(lambda m, h: m.a(h.movedim(1, -1)), a=nn.Linear(SIZE, 5, bias=False)),
}


@pytest.mark.parametrize("name", OFFSETLESS)
def test_without_a_bias_behind_it_the_weights_alone_take_over(name: str) -> None:
    model = redundant(OFFSETLESS[name])
    with torch.no_grad():
        model.write.bias.zero_()  # what the others determine, they determine without a constant
    graph = compressor.trace(model, images(1) + 3)
    moments = input_moments(graph, [images(20) + 3, images(20, seed=1) + 3])
    assert "a.weight" not in moments.means
    fresh = images(10, seed=2)
    with torch.no_grad():
        expected = model(fresh)
        compressor.cut(graph, {"write": torch.tensor([0, 2, 4, 7])}, means=moments)
        assert relative_error(model(fresh), expected) < 1e-10
    assert graph.notes == ()


def test_without_a_mean_moments_are_uncentred() -> None:
    graph = compressor.trace(redundant(OFFSETLESS["1x1"]), images(1))
    found = input_moments(graph, [images(7), images(5, seed=1)])
    with torch.no_grad():
        rows = graph.model.write(torch.cat([images(7), images(5, seed=1)])).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found.covariances["a.weight", "write"][0], rows.T @ rows / len(rows))


class Tied(nn.Module):
    """What reads the width is also what makes it: the weight of an embedding is that of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.words = nn.Linear(SIZE, 11, bias=False), nn.Embedding(11, SIZE)
        self.words.weight = self.head.weight
        self.other = nn.Linear(SIZE, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.words(x))
        return self.head(h) + self.other(h)


def test_a_weight_that_is_read_elsewhere_too_is_left_alone_and_named() -> None:
    torch.manual_seed(0)
    model, words = Tied().double(), torch.arange(44).remainder(11).view(4, 11)
    rows = model.head.weight.detach().clone()
    graph = compressor.trace(model, words)
    (group,) = graph.groups
    moments = input_moments(graph, [words])
    compressor.cut(graph, {group.name: torch.arange(5)}, means=moments)
    assert torch.equal(model.head.weight, rows[:, :5])
    (note,) = graph.notes
    assert note.startswith("not compensated: head.weight (")


def test_attention_is_named_once() -> None:
    torch.manual_seed(0)
    read = nn.MultiheadAttention(SIZE, 2, batch_first=True)
    model = Reader(lambda m, h: m.a(*3 * [h.flatten(2).transpose(1, 2)], need_weights=False)[0], a=read).double()
    graph = compressor.trace(model, images(1))
    for _ in range(2):
        try:
            input_moments(graph, [images()])
        except InputError:
            pytest.fail("a consumer that cannot be compensated is no reason to stop")
    assert len([note for note in graph.notes if "compensated" in note and "a.in_proj_weight" in note]) <= 1


# -- what it needs


def test_too_few_samples_say_how_many_it_takes() -> None:
    model = redundant(READERS["Linear"])
    graph = compressor.trace(model, images(1))
    with pytest.raises(
        InputError, match=r"predicts each of 8 channels .* and 3 samples are too few for it: give 16 or"
    ):
        input_moments(graph, [images(3)])


def test_a_consumer_with_too_few_samples_is_compensated_by_the_mean() -> None:
    layers = {"a": nn.Linear(SIZE, 5), "b": nn.Conv1d(SIZE, 5, 1)}
    model = redundant(lambda: Reader(lambda m, h: m.a(h.mean((2, 3))) + m.b(h.flatten(2)).mean(2), **layers))
    graph = compressor.trace(model, images(1))
    found = input_moments(graph, [images(3)])
    assert found.covariances.keys() == {("b.weight", "write")}
    assert found.means.keys() == {"a.weight", "b.weight"}
    note = (
        "compensated by the mean alone: a.weight ('linear' predicts each of 8 channels from the others, and 3 samples"
    )
    assert [each.startswith(note) for each in graph.notes] == [True]
    input_moments(graph, [images(3)])  # said once
    assert len(graph.notes) == 1


def test_no_batch_has_no_moments() -> None:
    graph = compressor.trace(redundant(READERS["1x1"]), images(1))
    with pytest.raises(InputError, match="no batch to take moments of: give at least one batch"):
        input_moments(graph, [])


def test_inputs_that_are_not_finite_are_refused() -> None:
    graph = compressor.trace(redundant(READERS["1x1"]), images(1))
    bad = images()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(
        InputError, match=r"the input of 'a.weight' is not finite on these inputs, or its square is not: leave out"
    ):
        input_moments(graph, [bad])


def test_inputs_whose_squares_are_not_finite_are_refused() -> None:
    model = redundant(READERS["1x1"]).float()
    graph = compressor.trace(model, images(1).float())
    with pytest.raises(
        InputError, match=r"the input of 'a.weight' is not finite on these inputs, or its square is not"
    ):
        input_moments(graph, [images().float() * 1e20])


def test_linear_without_calibration_is_refused() -> None:
    model = redundant(READERS["1x1"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="compensate='linear' needs real inputs: pass calibration="):
        compressor.prune(model, images(1), compensate="linear")
    with pytest.raises(InputError, match="compensate='linear' needs real inputs: pass calibration="):
        compressor.Pruner(model, images(1), "l1", optimizer=optimizer, total_steps=10, compensate="linear")


@given(st.floats(1e-6, 1e-2))
@settings(deadline=None, max_examples=20)
def test_a_weight_does_not_grow_beyond_what_can_be_trained(scale: float) -> None:
    """A channel that hardly varies could tell what goes, by weights of thousands: what the others tell has to do."""
    model = redundant(READERS["1x1"])
    with torch.no_grad():
        model.write.weight[0] *= scale
        model.write.bias[0] *= scale
        errors, expected = [], model(images())
        for keep in ([0, 2, 4], [2, 4]):
            smaller = copy.deepcopy(model)
            graph = compressor.trace(smaller, images(1))
            compressor.cut(graph, {"write": keep}, means=input_moments(graph, [images()]))
            errors.append(relative_error(smaller(images()), expected))
            assert smaller.a.weight.norm() <= 4 * model.a.weight.norm()
    assert errors[0] <= 1.001 * errors[1]
