"""The check of a cut: what one trace cannot see shows when the cut model runs again, and nothing is changed then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import masked, relative_error, shake
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import CutError, StaleGraphError
from compressor.graph.verification import verify_against_recording
from compressor.surgery import mask_channels


class Between(nn.Module):
    """Any code between two convolutions; it may read the attributes."""

    def __init__(self, code: Callable[[Between, Tensor], Tensor], **attributes: object) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.code = code
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.code(self, self.a(x)))


X = torch.randn(2, 3, 4, 4, dtype=torch.float64)

# Every one of these keeps the number 8, or positions of 8, in code that no attribute says.
BAKED: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "view": lambda self, h: h.view(2, 8, 16).view(2, 8, 4, 4),
    "reshape into blocks": lambda self, h: h.reshape(2, 2, 4, 4, 4).flatten(1, 2),
    "constant": lambda self, h: h + torch.zeros(1, 8, 1, 1, dtype=h.dtype),
    "ones": lambda self, h: h * torch.ones(8, 1, 1, dtype=h.dtype),
    "slices": lambda self, h: torch.cat([h[:, :4], h[:, 4:]], 1),
    "split": lambda self, h: torch.cat(h.split([4, 4], 1), 1),
    "narrow": lambda self, h: torch.cat([h.narrow(1, 0, 4), h.narrow(1, 4, 4)], 1),
    "expand": lambda self, h: h + h.mean(1, keepdim=True).expand(-1, 8, -1, -1),
    "layer norm": lambda self, h: F.layer_norm(h.movedim(1, -1), (8,)).movedim(-1, 1),
    "group norm": lambda self, h: F.group_norm(h, 8),
    "functional depthwise": lambda self, h: F.conv2d(h, torch.ones(8, 1, 1, 1, dtype=h.dtype), groups=8),
    "another path": lambda self, h: torch.relu(h) if h.shape[1] == 8 else h,
    "an operation less": lambda self, h: torch.relu(torch.relu(h)) if h.shape[1] == 8 else torch.relu(h),
    "stops earlier": lambda self, h: h if h.shape[1] == 8 else h * 1,
    "another tensor": lambda self, h: torch.relu(h) * (h if h.shape[1] == 8 else h.detach().abs()),
    "a value from the shape": lambda self, h: h * h.shape[1] ** -0.5,
    "a whole value from the shape": lambda self, h: h / h.shape[1],
    "a constant from the shape": lambda self, h: h * torch.tensor(1.0 / h.shape[1], dtype=h.dtype),
    "constants from the shape": lambda self, h: h * torch.tensor([h.shape[1], 1.0, 1.0, 1.0], dtype=h.dtype),
    "a fill from the shape": lambda self, h: h * torch.full((1,), 1.0 / h.shape[1], dtype=h.dtype),
}


@pytest.mark.parametrize("name", BAKED)
def test_a_number_in_the_code_is_refused_or_frozen_and_nothing_is_changed(name: str) -> None:
    model = shake(Between(BAKED[name]))
    graph = compressor.trace(model, X)
    before, expected = copy.deepcopy(model.state_dict()), model(X)
    for group in graph.groups:
        with pytest.raises(CutError) as refusal:
            compressor.cut(graph, {group.name: [0, 2, 5] if group.size == 8 else [0]})
        assert refusal.value.groups == (group.name,)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert torch.equal(model(X), expected)


def test_a_slice_of_equal_halves_that_reads_the_shape_is_cut() -> None:
    def halves(self: Between, h: Tensor) -> Tensor:
        half = h.shape[1] // 2
        return torch.cat([h[:, half:], h[:, :half]], 1)

    model = shake(Between(halves))
    graph = compressor.trace(model, X)
    keep = {"a": torch.tensor([1, 3])}
    expected = masked(graph, keep)(X)
    compressor.cut(graph, keep)
    assert model.a.out_channels == 4
    assert relative_error(model(X).detach(), expected.detach()) < 1e-12


# The same numbers, said by attributes of the module whose code it is.
SAID: dict[str, tuple[Callable[[Between, Tensor], Tensor], dict[str, object]]] = {
    "width": (lambda self, h: h.view(2, self.width, -1).view(2, self.width, 4, 4), {"width": 8}),
    "heads": (lambda self, h: h.view(2, self.heads, -1, 16).softmax(-1).flatten(1, 2).view(h.shape), {"heads": 4}),
    "pieces": (lambda self, h: torch.cat(h.split(self.sizes, 1)[::-1], 1), {"sizes": (3, 5)}),
    "bound": (lambda self, h: torch.cat([h[:, self.at :], h[:, : self.at]], 1), {"at": 3}),
    "a tuple of shapes": (lambda self, h: h.view(2, *self.shape), {"shape": (8, 4, 4)}),
}


@pytest.mark.parametrize("name", SAID)
def test_a_number_among_the_attributes_follows(name: str) -> None:
    code, attributes = SAID[name]
    model = shake(Between(code, **attributes))
    graph = compressor.trace(model, X)
    keep = {group.name: torch.arange(0, group.size, 2) for group in graph.groups}
    assert keep
    expected = masked(graph, keep)(X)
    compressor.cut(graph, keep)
    (old,) = attributes.items()
    assert getattr(model, old[0]) != old[1]
    assert relative_error(model(X).detach(), expected.detach()) < 1e-12


def test_an_attribute_that_is_no_size_after_all_is_put_back() -> None:
    """The number of repetitions happens to be the number of channels."""

    def repeated(self: Between, h: Tensor) -> Tensor:
        for _ in range(self.times):
            h = torch.relu(h).view(2, 8, 4, 4)
        return h

    model = shake(Between(repeated, times=8))
    graph = compressor.trace(model, X)
    with pytest.raises(CutError):
        compressor.cut(graph, {"a": [0, 1]})
    assert model.times == 8


class Permuted(nn.Module):
    """Takes channels in the order that a buffer says; some twice, some never."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(5, 4, 1)
        self.register_buffer("order", torch.tensor([5, 0, 3, 3, 1]))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h[:, self.order] if self.kind == "index" else h.index_select(1, self.order))


@pytest.mark.parametrize("kind", ["index", "index_select"])
def test_a_buffer_of_positions_is_renumbered(kind: str) -> None:
    model = shake(Permuted(kind))
    graph = compressor.trace(model, X)
    keep = {group.name: torch.arange(group.size)[1:] if group.size > 1 else torch.arange(1) for group in graph.groups}
    expected = masked(graph, keep)(X)
    compressor.cut(graph, keep)
    assert model.a.out_channels < 6
    assert int(model.order.max()) < model.a.out_channels
    assert len(model.order) == model.b.in_channels
    assert relative_error(model(X).detach(), expected.detach()) < 1e-12
    compressor.trace(model, X)


def test_positions_in_a_list_stay() -> None:
    model = shake(Between(lambda self, h: h[:, [7, 6, 5, 4, 3, 2, 1, 0]]))
    graph = compressor.trace(model, X)
    assert graph.groups == ()
    assert any("positions are taken by number" in each.reason for each in graph.frozen)


class Depthwise(Between):
    """A depthwise convolution whose number of blocks is a number in the code."""

    def __init__(self) -> None:
        super().__init__(lambda self, h: F.conv2d(h, self.kernel, groups=8))
        self.kernel = nn.Parameter(torch.randn(8, 1, 3, 3))


def test_blocks_of_a_convolution_in_the_code_are_refused() -> None:
    model = shake(Depthwise())
    graph = compressor.trace(model, X)
    with pytest.raises(CutError, match=r"aten\.convolution in the model does not follow the cut"):
        compressor.cut(graph, {"a": [0, 1]})


class Caches(nn.Module):
    """Keeps what it computed once, in an attribute and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.seen: Tensor | None = None
        self.register_buffer("scale", None)
        self.table: dict[str, Tensor] = {}
        self.rows: list[Tensor] = []
        self.state = SimpleNamespace(last=None)

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is None:
            self.seen, self.scale = self.a(x).mean(), torch.ones(1, dtype=x.dtype)
            self.table["x"] = self.state.last = self.seen
            self.rows.append(self.seen)
        return self.b(self.a(x)) * self.scale


def test_a_cache_does_not_keep_tensors_without_data() -> None:
    model = shake(Caches())
    graph = compressor.trace(model, X)
    caches = (model.seen, model.scale, model.state.last, model.table, model.rows)
    assert caches == (None, None, None, {}, [])
    compressor.cut(graph, {"a": [0, 1]})
    assert (model.seen, model.scale, model.state.last, model.table, model.rows) == caches
    assert model(X).shape == (2, 5, 4, 4)
    assert model.scale is not None


def test_of_two_groups_the_one_that_does_not_follow_is_named() -> None:
    model = shake(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), Between(BAKED["view"]), nn.Conv2d(5, 2, 1)))
    graph = compressor.trace(model, X)
    with pytest.raises(CutError) as caught:
        compressor.cut(graph, {group.name: [0] for group in graph.groups})
    assert caught.value.groups == ("2.a",)


def test_a_model_that_keeps_what_it_computed_is_traced_again() -> None:
    class Lazy(Between):
        def __init__(self) -> None:
            super().__init__(lambda self, h: h * self.factor())
            self.known: Tensor | None = None

        def factor(self) -> Tensor:
            if self.known is None:
                self.known = torch.zeros(1, dtype=torch.float64).exp()
            return self.known

    model = shake(Lazy())
    graph = compressor.trace(model, X)
    expected = copy.deepcopy(model)
    model(X)
    mask_channels(compressor.trace(expected, X), {"a": range(2, graph["a"].size)})
    compressor.cut(graph, {"a": [0, 1]})
    assert relative_error(model(X).detach(), expected(X).detach()) < 1e-12


def test_a_trace_on_real_tensors_is_the_same_twice() -> None:
    """Memory of tensors that died is used again: a constant in the place of one of them is a constant all the same."""

    def code(self: Between, h: Tensor) -> Tensor:
        h = h + h.detach().nonzero().sum() * 0
        for _ in range(30):
            h = h * torch.tensor(0.5, dtype=h.dtype) + torch.relu(h).abs()
        return h

    graph = compressor.trace(Between(code).double(), X)
    verify_against_recording(graph, graph.recording)
    assert "aten.lift_fresh" not in {record.op for record in graph.recording.log.records}


def test_a_model_that_does_not_run_any_more_is_refused() -> None:
    model = shake(Between(lambda self, h: h))
    graph = compressor.trace(model, X)
    model.code = lambda self, h: h[:, :7]
    with pytest.raises(
        StaleGraphError, match=r"The same shows without any cut.*trace\(model, example_inputs\) once more"
    ):
        compressor.cut(graph, {"a": [0, 1]})
    assert model.a.out_channels == 8


class Choosing(nn.Module):
    """Goes on with the places that score high, some by themselves, as a detector does after its proposals."""

    def __init__(self, choose: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.a, self.s, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1), nn.Linear(8, 6)
        self.c = nn.Linear(6, 4)
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        tokens = h.flatten(2).transpose(1, 2).flatten(0, 1)
        found = [F.relu(self.b(tokens[chosen])) for chosen in self.choose(self.s(h).flatten())]
        return self.c(torch.cat(found)) if found else tokens.new_zeros(0, 4)


CHOICES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "a mask": lambda score: [score > score.mean()],
    "numbers of places": lambda score: [torch.where(score > score.mean())[0]],
    "each by itself": lambda score: [place[None] for place in torch.nonzero(score > score.mean()).flatten()],
    "a branch": lambda score: (
        [score > score.mean(), score < score.mean()] if score[0] > score[1] else [score >= score.mean()]
    ),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("seed", range(4))
def test_another_choice_of_the_cut_model_does_not_refuse_what_is_right(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = shake(Choosing(CHOICES[name]), seed).eval()
    graph = compressor.trace(model, X)
    assert graph.sizes() == {"a": 8, "b": 6}
    keep = {"a": torch.arange(0, 8, 2), "b": torch.arange(3)}
    expected = masked(graph, keep)(X)
    compressor.cut(graph, keep)
    assert relative_error(model(X), expected) <= 1e-12


class Boxes(nn.Module):
    """Boxes from a head, as detectors make them: slices of one, put together and flattened, and a label of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(torch.relu(self.stem(x))).flatten(2).view(1, 3, 4, -1).permute(0, 3, 1, 2).reshape(-1, 4)
        shift, size = y[:, 0::4], y[:, 1::4]
        return torch.stack((shift - size, shift + size), dim=2).flatten(1), torch.full((len(y),), 1.0) * 2


def test_slices_of_one_are_read_as_in_the_trace() -> None:
    model = Boxes()
    graph = compressor.trace(model, torch.randn(1, 3, 4, 4))
    verify_against_recording(graph, graph.recording)
    compressor.cut(graph, {"stem": [0, 5, 6]})
    assert model(torch.randn(1, 3, 4, 4))[0].shape == (48, 2)
