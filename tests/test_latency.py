"""Runners take turns, time is counted by the clock, and what is timed is the real thing. No test waits for a time."""

from __future__ import annotations

import contextlib
import gc
import statistics
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor._utils import speedup
from compressor.deploy import latency, timing
from compressor.deploy.export import export_onnx
from compressor.deploy.latency import Comparison, compare
from compressor.deploy.machine import describe_machine
from compressor.deploy.timing import Latency, measure, onnx_runner, torch_runner
from compressor.errors import InputError, RangeError


class Clock:
    """A clock that only the runners move."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, *seconds: float) -> Callable[[], None]:
        """Return a runner that takes these times, over and over."""
        made = 0

        def run() -> None:
            nonlocal made
            self.now += seconds[made % len(seconds)]
            self.calls.append(name)
            made += 1

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    return clock


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


# -- measuring


def test_runners_take_turns_and_warm_up_is_not_counted(clock: Clock) -> None:
    runners = {"a": clock.runner("a", 5.0, 0.001, 0.002), "b": clock.runner("b", 7.0, 0.003)}
    found = measure(runners, runs=2, min_runs=1, warmup=1, budget_s=100)
    assert clock.calls[:2] == ["a", "b"]
    assert clock.calls[2:4] == clock.calls[:3:-1]  # every other round backwards
    assert list(found) == ["a", "b"]
    assert [round(x, 6) for x in found["a"].samples_ms] == [1.0, 2.0]
    assert [round(x, 6) for x in found["b"].samples_ms] == [3.0, 7000.0]


def test_no_runner_has_other_neighbours_than_the_rest(clock: Clock) -> None:
    runners = {name: clock.runner(name, *[1e-3] * 801) for name in "abcd"}
    measure(runners, runs=800, min_runs=1, warmup=1, budget_s=1e6)
    after_warmup = clock.calls[4:]
    for name in "abcd":
        before = Counter(first for first, then in pairwise(after_warmup) if then == name)
        # Itself at a quarter of 400 turns backwards and a sixteenth of 400 new orders.
        assert before == {each: pytest.approx(125 if each == name else 225, abs=45) for each in "abcd"}


def test_a_cuda_graph_holds_the_model_whose_memory_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(contextlib.nullcontext):
        def __init__(self, *args: object, **how: object) -> None:
            super().__init__(self)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args: None

    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph", "synchronize", "current_device"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    model = tiny().eval()
    held = weakref.ref(model)
    run = timing.cuda_graph(partial(model, torch.zeros(1, 3, 8, 8)))
    del model
    gc.collect()
    run()
    assert held() is not None


def test_a_slow_runner_ends_with_the_budget(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    found = measure({"a": clock.runner("a", 1.0)}, runs=1000, min_runs=2, warmup=10, budget_s=10)
    assert found["a"].n == 8  # two seconds of ten went into warming up
    assert "time was up after 8 of 1000 rounds" in caplog.text
    assert len(clock.calls) == 10


def test_a_very_slow_runner_still_gets_its_least_rounds(clock: Clock) -> None:
    found = measure({"a": clock.runner("a", 60.0)}, runs=1000, min_runs=3, warmup=10, budget_s=10)
    assert (found["a"].n, len(clock.calls)) == (3, 4)


def test_a_fast_runner_ends_with_its_rounds(clock: Clock) -> None:
    found = measure({"a": clock.runner("a", 1e-6)}, runs=30, warmup=4, budget_s=10)
    assert (found["a"].n, len(clock.calls)) == (30, 34)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"runs": 3, "min_runs": 4}, "runs = 3 is out of range: give runs in 4, 5"),
        ({"min_runs": 0}, "min_runs = 0 is out of range: give min_runs in 1, 2"),
        ({"warmup": 0}, "warmup = 0 is out of range"),
        ({"budget_s": 0.0}, r"budget_s = 0\.0 is out of range: give budget_s in \(0, inf\)"),
    ],
)
def test_a_plan_without_sense_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(RangeError, match=message):
        measure({"a": int}, **plan)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(InputError, match="runners is empty: give at least one"):
        measure({})


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_interpolate_between_the_calls_in_order(samples: list[float], q: float) -> None:
    found, ordered = Latency(tuple(samples)), sorted(samples)
    place = q / 100 * (len(samples) - 1)
    low = ordered[int(place)]
    high = ordered[min(int(place) + 1, len(samples) - 1)]
    assert found.percentile_ms(q) == pytest.approx(low + (high - low) * (place % 1), rel=1e-9)
    assert found.p50_ms == pytest.approx(statistics.median(samples))
    assert found.mean_ms == pytest.approx(statistics.fmean(samples))
    assert (found.p90_ms, found.p99_ms) == (found.percentile_ms(90), found.percentile_ms(99))
    assert found.percentile_ms(0) == min(samples)
    assert found.percentile_ms(100) == max(samples)


# -- runners


def test_runners_run_the_model_and_the_file(tmp_path: Path) -> None:
    model, inputs = tiny().eval(), torch.randn(5, 3, 8, 8)
    export_onnx(model, tmp_path / "m.onnx", inputs)
    ours, theirs = torch_runner(model, inputs)(), onnx_runner(tmp_path / "m.onnx", inputs)()
    assert isinstance(ours, Tensor)
    assert torch.equal(ours, model(inputs))
    assert not ours.requires_grad
    assert np.allclose(theirs.copy_outputs_to_cpu()[0], ours.numpy(), atol=1e-5)  # type: ignore[attr-defined]


def test_a_runner_takes_what_the_model_takes() -> None:
    model = nn.Bilinear(2, 3, 4).eval()
    inputs = {"input1": torch.randn(5, 2), "input2": torch.randn(5, 3)}
    assert torch.equal(torch_runner(model, inputs)(), torch_runner(model, tuple(inputs.values()))())  # type: ignore[arg-type]


def test_a_model_in_training_mode_is_not_timed() -> None:
    with pytest.raises(InputError, match=r"Sequential is in training mode: call model\.eval\(\) before timing it"):
        torch_runner(tiny(), torch.randn(1, 3, 8, 8))


# -- side by side


def test_models_are_timed_side_by_side_in_every_place(tmp_path: Path) -> None:
    models = {"dense": tiny(), "pruned": tiny().eval()}
    files = {name: tmp_path / f"{name}.onnx" for name in models}
    for name, path in files.items():
        export_onnx(models[name], path, torch.randn(1, 3, 8, 8))
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    random = torch.get_rng_state()
    report = compare(models, (3, 8, 8), onnx_files={"onnxruntime": files}, batch_sizes=(1, 3), runs=6, budget_s=30)
    places = [(each.backend, each.device, each.batch_size) for each in report.comparisons]
    assert places == [("torch", "cpu", 1), ("torch", "cpu", 3), ("onnxruntime", "cpu", 1), ("onnxruntime", "cpu", 3)]
    for each in report.comparisons:
        assert {name: found.n for name, found in each.latencies.items()} == {"dense": 6, "pruned": 6}
        assert each.speedup("dense").ratio == 1.0
        assert each.control.n == 6
    assert (report.threads, report.machine) == (1, describe_machine())
    assert (models["dense"].training, models["pruned"].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), random)
    for name, model in models.items():
        assert all(torch.equal(before[name][key], value) for key, value in model.state_dict().items())


def test_the_budget_is_shared_by_the_places(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "torch_runner", lambda model, inputs: clock.runner("x", 1.0))
    report = compare({"a": tiny()}, (3, 8, 8), batch_sizes=(1, 2, 4, 8), budget_s=400)
    # Ten rounds of two calls for warming up, the second of them the control's.
    assert [each.latencies["a"].n for each in report.comparisons] == [40] * 4
    assert clock.now == 1400


def test_threads_are_set_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(latency, "torch_runner", lambda model, inputs: lambda: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    assert compare({"a": tiny()}, (3, 8, 8), batch_sizes=(1,), threads=2, runs=1).threads == 2
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def test_the_speedup_is_the_ratio_of_medians_to_the_first() -> None:
    times = {"dense": Latency((9.0, 6.0, 100.0)), "pruned": Latency((3.0, 1.0, 3.0))}
    found = Comparison("torch", "cpu", 1, times, Latency((9.0, 9.9, 100.0)))
    assert found.speedup("pruned").ratio == 3.0
    assert found.noise == pytest.approx(1 - 9 / 9.9)
    assert latency._noisy(found) == ["noisy: a model and itself differ by 9.1% in torch, batch 1, more than 3%"]


def test_the_interval_of_a_speedup_holds_the_truth_as_often_as_it_says() -> None:
    dice = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        busy = dice.lognormal(0, 0.5, 60)  # rounds are slow for both
        base, other = (true * busy * dice.lognormal(0, 0.1, 60) for true in (3.0, 2.0))
        found = speedup(base, other)
        inside += found.low <= 1.5 <= found.high
    assert 0.9 <= inside / 200 <= 1.0


def test_equal_times_cannot_be_told_apart() -> None:
    assert speedup([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).is_within(0)
    assert not speedup([2.0] * 20, [1.0] * 20).is_within(0.5)
    assert speedup([1.02] * 20, [1.0] * 20).is_within(0.03)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"onnx_files": {"onnxruntime": {"b": "x.onnx"}}},
            r"onnx_files are of \['b'\], and the models \['a'\]: give a file for each",
        ),
        ({"device": "cuda"}, r"model 'a' is on cpu, and device is 'cuda': move it with model\.to\('cuda'\)"),
        ({"threads": 0}, "threads = 0 is out of range: give threads in 1, 2, 3"),
        ({"batch_sizes": (1, 0)}, "batch size = 0 is out of range"),
    ],
)
def test_a_comparison_without_sense_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare({"a": tiny()}, (3, 8, 8), **asked)


def test_the_machine_and_the_versions_are_named() -> None:
    found = describe_machine()
    assert list(found) == [*("cpu", "simd", "cores", "memory_gib", "gpu", "os", "python"), *_PACKAGES]
    assert all(found[name] for name in ("cpu", "simd", "cores", "os", "python", *_PACKAGES))
    assert torch.__version__.startswith(found["torch"])


_PACKAGES = ("torch", "torchvision", "onnxruntime", "onnx")
