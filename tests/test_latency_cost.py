"""Latency as a budget: layers read off the graph, a table of their times, and cuts that go on until it is measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models

import compressor
from compressor.budget import Budget, CostModel, PruningProgress
from compressor.deploy import LatencyCost, LatencyTable, Place, fragments, latency_cost, latency_table, torch_runner
from compressor.deploy.fragments import fragment
from compressor.deploy.latency_table import CLOCKS, Widest
from compressor.deploy.layers import Follower, Kind, fused_layers
from compressor.errors import InputError, RangeError, UnknownNameError
from compressor.graph import ChannelGraph
from compressor.pruning.aims import Aims
from compressor.pruning.relevance_scores import relevance_scores

X = torch.zeros(1, 3, 32, 32)
THREE = Kind("Conv", (14, 14), (3, 3), padding=(1, 1))


def graph_of(name: str, **options) -> compressor.ChannelGraph:
    torch.manual_seed(0)
    return compressor.trace(getattr(models, name)(weights=None, **options).eval(), torch.zeros(1, 3, 64, 64))


def widths_of(graph: compressor.ChannelGraph) -> list[tuple[int, int]]:
    sizes = graph.sizes()
    layers, _ = fused_layers(graph)
    return [
        tuple(each.fixed + sum(n * sizes[name] for name, n in each.per_channel.items()) for each in ends)
        for ends in ((layer.inputs, layer.outputs) for layer in layers)
    ]


# -- layers


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "resnext50_32x4d", "alexnet"]
)
def test_every_convolution_and_linear_layer_is_a_layer_with_its_own_widths(name: str) -> None:
    graph = graph_of(name)
    layers, unknown = fused_layers(graph)
    # Of maps smaller than 7 x 7 the pooling of VGG and AlexNet makes larger ones, which no engine is asked for.
    assert set(unknown) <= {"_adaptive_avg_pool2d in avgpool"}
    expected = [
        (each.in_channels, each.out_channels, each.kernel_size, each.stride, each.padding)
        for each in graph.model.modules()
        if isinstance(each, nn.Conv2d)
    ]
    found = [
        (*widths, layer.kind.kernel, layer.kind.stride, layer.kind.padding)
        for layer, widths in zip(layers, widths_of(graph), strict=True)
        if layer.kind.operator == "Conv"
    ]
    assert sorted(found) == sorted(expected)
    linear = [(each.in_features, each.out_features) for each in graph.model.modules() if isinstance(each, nn.Linear)]
    pairs = zip(layers, widths_of(graph), strict=True)
    assert [widths for layer, widths in pairs if layer.kind.operator == "Gemm"] == linear


def test_what_is_fused_is_one_layer() -> None:
    layers, _ = fused_layers(graph_of("resnet18"))
    by_name = {layer.name: layer.kind for layer in layers}
    assert by_name["conv1"].followers == (Follower("Relu"),)
    assert by_name["layer1.0.conv2"].followers == (Follower("Add", (), "map"), Follower("Relu"))
    assert by_name["layer2.0.downsample.0"].followers == (Follower("Add", (), "map"), Follower("Relu"))
    assert by_name["layer2.0.conv2"].followers == ()  # the other branch runs after it
    assert all(kind.bias for kind in by_name.values() if kind.operator == "Conv")  # that of the folded BatchNorm
    depthwise = [layer.kind for layer in fused_layers(graph_of("mobilenet_v2"))[0] if layer.kind.groups == 0]
    assert len(depthwise) == 17
    assert all(kind.followers == (Follower("Clip", (("min", 0.0), ("max", 6.0))),) for kind in depthwise)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vgg11_bn"])
def test_widths_follow_every_cut(name: str) -> None:
    graph = graph_of(name)
    before, _ = fused_layers(graph)
    compressor.prune(graph.model, graph.example_inputs, "l1", Budget(0.4, "macs"), compensate="none")
    anew = compressor.trace(graph.model, graph.example_inputs)
    sizes = {each.name: each.size for each in anew.groups}
    predicted = [
        tuple(each.fixed + sum(n * sizes[group] for group, n in each.per_channel.items()) for each in ends)
        for ends in ((layer.inputs, layer.outputs) for layer in before)
    ]
    assert predicted == widths_of(anew)
    assert [layer.kind for layer in before] == [layer.kind for layer in fused_layers(anew)[0]]


def test_what_is_no_layer_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).cumsum(2)

    layers, unknown = fused_layers(compressor.trace(Odd(), X))
    assert [layer.name for layer in layers] == ["conv"]
    assert unknown == ["cumsum in the model"]


# -- fragments


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vgg11_bn", "resnext50_32x4d"])
def test_every_layer_runs_alone_and_gives_its_own_shape(name: str) -> None:
    graph = graph_of(name)
    layers, _ = fused_layers(graph)
    distinct = {layer.kind: widths for layer, widths in zip(layers, widths_of(graph), strict=True)}
    for kind, (inputs, outputs) in distinct.items():
        model, feeds = fragment(kind, inputs, outputs, 2)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (result,) = session.run(None, feeds)
        assert result.shape[0] == 2
        if kind.operator == "Conv":
            layer = nn.Conv2d(1, 1, kind.kernel, kind.stride, kind.padding, kind.dilation)
            assert result.shape[2:] == layer(torch.zeros(1, 1, *kind.map)).shape[2:]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "torch"])
def test_every_engine_times_every_kind_of_layer(engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    kinds = {layer.kind for name in ("resnet18", "mobilenet_v3_small") for layer in fused_layers(graph_of(name))[0]}
    by_shape = {(kind.operator, kind.groups == 0, kind.followers): kind for kind in kinds}
    took = {kind: CLOCKS[engine](kind, 16, 16, Place()) for kind in by_shape.values()}
    # OpenVINO may compute a layer together with what stands before it, and counts whole microseconds.
    assert all(each > 0 for kind, each in took.items() if engine != "openvino" or kind.map[0] > 16)


def test_what_stands_around_a_layer_is_not_its_own() -> None:
    around = ("ReorderInput_kernel_time", "pre_nchwc_kernel_time", "side_f0", "in_abcd_acdb_pre", "f0.in_abcd_side_f0")
    assert all(fragments.is_around(name) for name in around)
    assert not any(
        fragments.is_around(name) for name in ("own", "own_nchwc_kernel_time", "own/WithoutBiases", "f0", "f1")
    )


def test_only_what_lies_between_counts() -> None:
    def event(name: str, microseconds: int) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds}

    def run(own: int) -> list[dict]:
        around = [event("ReorderInput", 900), event("pre_nchwc", 900), event("side_f0_nchwc", 900)]
        return [*around, event("own_nchwc", own), event("f1", 1), event("post", 900), {"cat": "Session", "name": "x"}]

    events = [*run(500), *run(10), *run(30), *run(20)]  # the first run allocates
    assert fragments._median_ns(events, 4) == 21_000
    assert fragments._median_ns([], 4) == 0


# -- the table


class Clock:
    """A processor that computes 16 channels at once; below 16, 4."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, kind: Kind, inputs: int, outputs: int, place: Place) -> float:
        self.calls += 1
        return float(
            place.batch * np.prod(kind.map) * self.up(inputs) * (1 if kind.has_one_width else self.up(outputs))
        )

    @staticmethod
    def up(width: int) -> int:
        step = 16 if width >= 16 else 4
        return -(-width // step) * step


def table(folder: Path) -> LatencyTable:
    return LatencyTable(Place(), folder, Clock())


def test_the_step_is_what_the_processor_computes_at_once(tmp_path: Path) -> None:
    assert table(tmp_path).step == 16
    assert LatencyTable(Place(), tmp_path / "b", lambda kind, a, b, *rest: float(a * b)).step == 1
    assert LatencyTable(Place(), tmp_path / "c", lambda kind, a, b, *rest: float(-(-a // 8) * -(-b // 8))).step == 8


@given(st.integers(16, 128), st.integers(16, 96))
@settings(deadline=None)
def test_between_two_steps_a_width_costs_what_the_next_one_costs(tmp_path_factory, inputs: int, outputs: int) -> None:
    surface = SURFACES.setdefault("it", None) or table(tmp_path_factory.mktemp("t")).surface(Widest(THREE, 128, 96))
    SURFACES["it"] = surface
    found = surface(np.array([inputs]), np.array([outputs]))
    assert found == pytest.approx([Clock()(THREE, inputs, outputs, Place())])


SURFACES: dict = {}


def test_nothing_is_measured_twice_on_one_machine(tmp_path: Path) -> None:
    first, layers = table(tmp_path), [Widest(THREE, 64, 128), Widest(THREE, 3, 64, (False, True))]
    first.prepare(layers)
    assert first._clock.calls > 0
    again = table(tmp_path)
    again.prepare(layers)
    assert again._clock.calls == 0
    # A narrower layer of the kind is read off what is known of a wider one.
    again.surface(layers[0])
    assert again.surface(Widest(THREE, 48, 80)) is again.surface(layers[0])
    assert again._clock.calls == 0
    (path,) = tmp_path.iterdir()
    path.write_text("damaged")
    assert table(tmp_path)._known == {}


def test_widths_of_a_grouped_convolution_are_multiples_of_its_groups(tmp_path: Path) -> None:
    kind = Kind("Conv", (14, 14), (3, 3), padding=(1, 1), groups=10)
    surface = table(tmp_path).surface(Widest(kind, 160, 160))
    assert all(width % 10 == 0 for width in (*surface.inputs, *surface.outputs))
    fragment(kind, int(surface.inputs[0]), int(surface.outputs[-1]), 1)


def test_other_places_have_other_times(tmp_path: Path) -> None:
    for place in (Place(), Place(batch=8), Place(threads=2)):
        LatencyTable(place, tmp_path, Clock()).prepare([Widest(THREE, 16, 16)])
    assert len(list(tmp_path.iterdir())) == 3


def test_processors_of_one_name_have_other_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = latency_table.describe_machine()
    for simd in ("avx2", "avx2, avx512_f"):
        monkeypatch.setattr(latency_table, "describe_machine", lambda simd=simd: {**here, "simd": simd})
        LatencyTable(Place(), tmp_path, Clock()).prepare([Widest(THREE, 16, 16)])
    assert len(list(tmp_path.iterdir())) == 2


def test_noise_makes_no_narrower_layer_dearer(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    noisy = LatencyTable(Place(), tmp_path, lambda *args: Clock()(*args) * float(noise.uniform(0.5, 2)))
    noisy._step = 16
    times = noisy.surface(Widest(THREE, 128, 128)).times
    assert (np.diff(times, axis=0) >= 0).all()
    assert (np.diff(times, axis=1) >= 0).all()


@pytest.mark.parametrize(("conv", "x"), [(nn.Conv1d, torch.zeros(1, 8, 32)), (nn.Conv3d, torch.zeros(1, 8, 6, 6, 6))])
def test_networks_of_other_dimensions_are_refused(conv: type, x: torch.Tensor) -> None:
    model = nn.Sequential(conv(8, 16, 3), nn.ReLU(), conv(16, 2, 3), nn.Flatten(), nn.LazyLinear(5))
    model(x)
    with pytest.raises(InputError, match="known of networks of two-dimensional convolutions"):
        compressor.prune(model, x, "l1", Budget(0.2, LatencyCost()))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_another_precision_is_refused(kind: torch.dtype, engine: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).to(kind)
    name = str(kind).removeprefix("torch.")
    with pytest.raises(InputError, match=rf"timed in float32, and the model is in {name}: cut model.float\(\)"):
        compressor.prune(model, X.to(kind), "l1", Budget(0.2, LatencyCost(Place(engine))))


def test_odd_places_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        Place("tensorflow")
    for wrong in ({"batch": 0}, {"threads": 0}):
        with pytest.raises(RangeError):
            Place(**wrong)
    with pytest.raises(UnknownNameError, match=r"unknown device .tpu."):
        Place(device="tpu")
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(InputError, match="in torch only"):
            Place(engine, "cuda")


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="no usable GPU to time layers on: give cpu"):
        LatencyTable(Place("torch", "cuda"), tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_of_the_latency_on_a_gpu(tmp_path: Path) -> None:
    graph = graph_of("resnet18")
    cost = LatencyCost(Place("torch", "cuda", batch=64))
    vars(cost)["table"] = LatencyTable(cost.place, tmp_path)
    found = compressor.prune(graph.model, graph.example_inputs, "l1", Budget(0.5, cost))
    assert found.measured is not None
    assert abs(found.measured - 0.5) < 0.1


def test_a_graph_of_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="a CUDA graph of a model on cpu"):
        torch_runner(nn.Conv2d(3, 8, 3).eval(), X, as_graph=True)


# -- the cost


def cost(folder: Path, **options) -> LatencyCost:
    made = LatencyCost(**options)
    made.__dict__["table"] = table(folder)
    return made


def test_a_prediction_is_the_sum_over_the_layers(tmp_path: Path) -> None:
    graph, clock, latency = graph_of("resnet18"), Clock(), cost(tmp_path)
    costs = CostModel(graph)
    layers, _ = fused_layers(graph)
    dense = sum(clock(layer.kind, *widths, Place()) for layer, widths in zip(layers, widths_of(graph), strict=True))
    assert costs.measure(latency, {}) == pytest.approx(dense, rel=1e-6)
    kept = {name: size // 2 for name, size in graph.sizes().items()}
    narrow = [
        tuple(each.fixed + sum(n * kept[name] for name, n in each.per_channel.items()) for each in ends)
        for ends in ((layer.inputs, layer.outputs) for layer in layers)
    ]
    half = sum(clock(layer.kind, *widths, Place()) for layer, widths in zip(layers, narrow, strict=True))
    assert costs.measure(latency, kept) == pytest.approx(half, rel=1e-6)
    price = costs.per_channel(latency, graph.sizes())
    assert all(each > 0 for each in price.values())


def test_a_network_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no layer of this network can be timed alone"):
        cost(tmp_path).count(compressor.trace(nn.Conv1d(3, 8, 3), torch.zeros(1, 3, 9)))


# -- cutting until it is measured


@dataclass
class Fake:
    """A cost whose prediction is too good: of what it says is gone, only a share is."""

    true: float
    name: str = "time"
    aligned: int = 1

    def count(self, graph):
        return lambda kept: kept.sum(1) * 1000

    def watch(self, graph):
        whole = sum(graph.sizes().values())
        return lambda: Said(self.true * (1 - sum(graph.sizes().values()) / whole))

    def __hash__(self) -> int:
        return id(self)


@dataclass
class Said:
    removed: float

    def says(self, asked: float, predicted: float) -> str:
        return f"asked {asked:.2f} predicted {predicted:.2f} got {self.removed:.2f}"

    def warning(self, predicted: int) -> str:
        return f"predicted {predicted}"


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in ((3, 100), (100, 100), (100, 100), (100, 10))))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("true", [0.8, 0.95, 1.0, 1.2])
def test_it_cuts_until_what_was_asked_is_measured(true: float, rounds: int) -> None:
    result = compressor.prune(convolutions(), torch.zeros(1, 3, 16, 16), "l1", Budget(0.5, Fake(true)), rounds=rounds)
    assert result.reached
    assert result.measured == pytest.approx(0.5, abs=0.03)
    assert result.measured == pytest.approx(true * result.removed)
    assert result.measure == "time"
    assert f"asked 0.50 predicted {result.removed:.2f} got {result.measured:.2f}" in result.notes
    assert any(note.startswith("predicted ") for note in result.notes)


def test_what_cannot_be_reached_is_said() -> None:
    result = compressor.prune(convolutions(), torch.zeros(1, 3, 16, 16), "l1", Budget(0.8, Fake(0.5)))
    assert not result.reached
    assert result.measured < 0.5
    assert result.blocked


def test_much_more_than_was_asked_is_said() -> None:
    result = compressor.prune(convolutions(), torch.zeros(1, 3, 16, 16), "l1", Budget(0.3, Fake(2.0)))
    assert result.measured > 0.4
    said = f"{result.measured:.1%} of the time went for the 30.0% that were asked"
    assert [note.startswith(said) for note in result.notes if "went for" in note] == [True]


def test_without_measuring_the_prediction_decides() -> None:
    class Exact(Fake):
        def watch(self, graph):
            return None

        def __hash__(self) -> int:
            return id(self)

    result = compressor.prune(convolutions(), torch.zeros(1, 3, 16, 16), "l1", Budget(0.5, Exact(1.0)))
    assert result.measured is None
    assert result.removed == pytest.approx(0.5, abs=0.01)


class Progress(PruningProgress):
    """What is gone is what was aimed at."""

    def __init__(self) -> None:
        self.gone = 0.0

    def removed(self) -> float:
        return self.gone

    def has_changed(self) -> bool:
        return True


def test_aims_as_in_the_example() -> None:
    progress = Progress()
    seen = iter([Said(0.40), Said(0.451), Said(0.496)])
    aims = Aims(Budget(0.5, "macs"), 1, progress, lambda: next(seen))
    asked = []
    for aim, _ in aims:
        asked.append(aim.sparsity)
        progress.gone = aim.sparsity
    assert asked == pytest.approx([0.425, 0.475, 0.524])
    assert aims.is_reached()


@pytest.mark.parametrize(("rounds", "first"), [(1, [0.85]), (2, [0.5, 0.85]), (4, [0.25, 0.5, 0.75, 0.85])])
def test_rounds_go_as_far_as_the_prediction_is_believed(rounds: int, first: list[float]) -> None:
    progress = Progress()
    asked, dues = [], []
    for aim, due in Aims(Budget(0.8, "macs"), rounds, progress, lambda: Said(progress.gone)):
        asked.append(aim.sparsity)
        dues.append(due)
        progress.gone = aim.sparsity
    assert asked == pytest.approx([*(0.8 * each for each in first), 0.73, 0.78, 0.8])
    assert dues == [*first[:-1], 1.0, 1.0, 1.0, 1.0]  # what groups are to lose whatever the budget is, in rounds


@pytest.mark.parametrize("disturbed", range(4))
def test_one_disturbed_look_leads_no_further_than_a_step(disturbed: int) -> None:
    """The table is right, and one look of several sees nothing of what is gone."""
    progress = Progress()
    count = iter(range(99))

    def look() -> Said:
        return Said(0.0 if next(count) == disturbed else progress.gone)

    aims = Aims(Budget(0.5, "macs"), 1, progress, look)
    for aim, _ in aims:
        progress.gone = aim.sparsity
    assert aims.is_reached()
    assert 0.49 <= progress.gone <= 0.55


def test_a_small_network_in_onnxruntime_itself(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("compressor.deploy.latency_table._cache", lambda: tmp_path)
    monkeypatch.setattr(latency_cost, "_SECONDS", 0.5)
    torch.manual_seed(0)
    first, second = (nn.Conv2d(width, 64, 3, padding=1) for width in (3, 64))
    model = nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    result = compressor.prune(model, X, "l1", Budget(0.4, LatencyCost(Place(batch=2))))
    assert result.measured is not None
    assert any(note.startswith("latency: 40.0% less asked, ") for note in result.notes)
    assert model[0].out_channels < 64
    (kept,) = tmp_path.iterdir()
    assert all(value > 0 for value in json.loads(kept.read_text()).values())


def test_relevance_is_not_taken_per_a_price_that_comes_in_steps() -> None:
    """A channel that saves nothing by itself would be worth infinitely much."""

    class Free:
        name, aligned = "latency", 1

        def count(self, graph: ChannelGraph) -> object:
            raise AssertionError("a single channel has no price")

    class Known:
        def scores(self) -> dict[str, Tensor]:
            return {"0": torch.tensor([1.0, -2.0, 3.0])}

        def confidence(self) -> dict[str, Tensor]:
            return {"0": torch.tensor([0.0, 0.0, 1.0])}

    found = relevance_scores(Known(), compressor.trace(convolutions(), X), Free(), 0.95)["0"]
    assert found.tolist() == pytest.approx([1.0, -2.0, 13.0])
