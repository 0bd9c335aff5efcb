"""Milliseconds, side by side: dense and pruned take turns in one run, so that whatever else happens hits both.

    report = compare({"dense": dense, "pruned": pruned}, (3, 32, 32), onnx_files={"dense": ..., "pruned": ...})

Warm-up is not counted, threads are set and reported, a GPU is waited for, and the machine is named.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from compressor._utils import as_arguments, device_of, evaluating, moved, named_tensors
from compressor.deploy.session import open_session
from compressor.errors import InputError, RangeError

Runner = Callable[[], object]

WARM_UP_SHARE = 0.2  # of the time, at most


@dataclass(frozen=True)
class Latency:
    """How long the calls of one runner took, in the order in which they were made.

    Attributes:
        samples_ms: one value for each timed call, milliseconds for a whole batch.
    """

    samples_ms: tuple[float, ...] = field(repr=False)

    @property
    def n(self) -> int:
        """Number of timed calls."""
        return len(self.samples_ms)

    @property
    def mean_ms(self) -> float:
        """Mean."""
        return sum(self.samples_ms) / self.n

    @property
    def p50_ms(self) -> float:
        """Median."""
        return self.percentile_ms(50)

    @property
    def p90_ms(self) -> float:
        """Nine of ten calls took at most this long."""
        return self.percentile_ms(90)

    @property
    def p99_ms(self) -> float:
        """Ninety-nine of a hundred calls took at most this long; close to the longest for few calls."""
        return self.percentile_ms(99)

    def percentile_ms(self, q: float) -> float:
        """Give a percentile, `q` in [0, 100], interpolated linearly; 0 is the shortest call and 100 the longest."""
        ordered = sorted(self.samples_ms)
        place = q / 100 * (self.n - 1)
        low = ordered[int(place)]
        return low + (ordered[min(int(place) + 1, self.n - 1)] - low) * (place % 1)


def measure(
    runners: Mapping[str, Runner], *, runs: int = 200, min_runs: int = 5, warmup: int = 10, budget_s: float = 10.0
) -> dict[str, Latency]:
    """Time runners in turns: A B A B ...

    Args:
        runners: by name, what to call; it must return only when the work is done (`torch_runner` waits for the GPU).
        runs: rounds at most.
        min_runs: rounds at least, however long they take.
        warmup: rounds before them that are not counted, fewer (but one) where they would take a fifth of the time.
        budget_s: begin no further round after this many seconds, warm-up included.

    Raises:
        InputError: no runners.
        RangeError: `runs` < `min_runs`, `min_runs` < 1, `warmup` < 1, or a budget that is not positive.
    """
    if not runners:
        raise InputError("runners is empty: give at least one")
    _check_plan(runs, min_runs, warmup, budget_s)
    start = perf_counter()
    for _ in _rounds(warmup, 1, start + WARM_UP_SHARE * budget_s):
        for run in runners.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in _rounds(runs, min_runs, start + budget_s):
        for name, run in runners.items():
            began = perf_counter()
            run()
            samples[name].append(1e3 * (perf_counter() - began))
    return {name: Latency(tuple(values)) for name, values in samples.items()}


def _check_plan(runs: int, min_runs: int, warmup: int, budget_s: float) -> None:
    for name, value, least in (("min_runs", min_runs, 1), ("runs", runs, min_runs), ("warmup", warmup, 1)):
        if value < least:
            raise RangeError(name, value, f"{least}, {least + 1}, ...")
    if not budget_s > 0:
        raise RangeError("budget_s", budget_s, "(0, inf)")


def _rounds(most: int, least: int, deadline: float) -> Iterator[int]:
    """Count rounds until there are enough, or time is up."""
    for done in range(most):
        if done >= least and perf_counter() >= deadline:
            return
        yield done


# -- what can be timed


def torch_runner(model: nn.Module, inputs: Any) -> Runner:
    """Give a call of the model that returns when the result is there.

    Args:
        model: in evaluation mode.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments; they are put on the model's device.

    Raises:
        InputError: the model is in training mode; timing it would change its BatchNorm statistics.
    """
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode: call model.eval() before timing it")
    device = device_of(model)
    args, kwargs = as_arguments(moved(inputs, device))

    def run() -> object:
        with torch.inference_mode():
            result = model(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return result

    return run


def onnx_runner(path: str | Path, inputs: Any, device: str = "cpu", *, threads: int = 1) -> Runner:
    """Give a call of an ONNX file in onnxruntime; inputs and outputs stay on the device.

    Args:
        path: the ONNX file.
        inputs: as for the model that was exported.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of one operation.

    Raises:
        InputError: onnxruntime cannot use the device.
    """
    return _bound(open_session(Path(path), device, threads=threads), inputs, torch.device(device))


def _bound(session: Any, inputs: Any, device: torch.device) -> Runner:
    """Bind inputs and outputs to memory on the device once, so that a call copies nothing."""
    from onnxruntime import OrtValue

    binding, place = session.io_binding(), (device.type, device.index or 0)
    for slot, (_, tensor) in zip(session.get_inputs(), named_tensors(inputs), strict=True):
        binding.bind_ortvalue_input(slot.name, OrtValue.ortvalue_from_numpy(tensor.cpu().numpy(), *place))
    for slot in session.get_outputs():
        binding.bind_output(slot.name, *place)
    binding.synchronize_inputs()

    def run() -> object:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding

    return run


# -- models side by side


@dataclass(frozen=True)
class Comparison:
    """Models timed in turns in one place.

    Attributes:
        backend: "torch" or "onnxruntime".
        device, batch_size: where, and how many examples at once.
        latencies: by model, in the order in which they were given.
    """

    backend: str
    device: str
    batch_size: int
    latencies: Mapping[str, Latency]

    def speedup(self, model: str) -> float:
        """Give how many times as fast as the first model this one is: the ratio of the medians."""
        return next(iter(self.latencies.values())).p50_ms / self.latencies[model].p50_ms


@dataclass(frozen=True)
class LatencyReport:
    """All comparisons of one run; `threads` CPU threads were used, on `machine`."""

    comparisons: tuple[Comparison, ...]
    threads: int
    machine: Mapping[str, Any]


def compare(
    models: Mapping[str, nn.Module],
    example_shape: Sequence[int],
    *,
    onnx_files: Mapping[str, str | Path] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    device: str = "cpu",
    threads: int = 1,
    runs: int = 200,
    budget_s: float = 60.0,
) -> LatencyReport:
    """Time models side by side, in PyTorch and, where their files are given, in onnxruntime.

    Args:
        models: by name, the model that the others are compared with first; left as they were.
        example_shape: of one example without the batch, `(3, 32, 32)` say; the values are random.
        onnx_files: the exported file of each model.
        batch_sizes: how many examples at once.
        device: "cpu", "cuda" or "cuda:N", where the models already are.
        threads: CPU threads.
        runs: rounds at most in each place.
        budget_s: seconds for everything. Each place gets an equal share, and five rounds in any case.

    Raises:
        InputError: no model, a model on another device, files of other models, or a device that onnxruntime cannot use.
        RangeError: a batch size or a number of threads below 1.
    """
    _check_comparison(models, onnx_files, batch_sizes, device, threads)
    share_s = budget_s / (len(batch_sizes) * (2 if onnx_files else 1))
    comparisons = []
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(threads))
        for model in models.values():
            stack.enter_context(evaluating(model))
        for backend, make in _makers(models, onnx_files, device, threads).items():
            for size in batch_sizes:
                inputs = torch.randn(size, *example_shape, generator=torch.Generator().manual_seed(0))
                runners = {name: make(name, inputs) for name in models}
                latencies = measure(runners, runs=runs, min_runs=min(5, runs), budget_s=share_s)
                comparisons.append(Comparison(backend, device, size, latencies))
    return LatencyReport(tuple(comparisons), threads, machine())


def _check_comparison(
    models: Mapping[str, nn.Module],
    onnx_files: Mapping[str, str | Path] | None,
    batch_sizes: Sequence[int],
    device: str,
    threads: int,
) -> None:
    if onnx_files and onnx_files.keys() != models.keys():
        raise InputError(f"onnx_files are of {list(onnx_files)}, and the models {list(models)}: give a file for each")
    for name, model in models.items():
        if (found := device_of(model)).type != torch.device(device).type:
            raise InputError(
                f"model {name!r} is on {found}, and device is {device!r}: move it with model.to({device!r})"
            )
    for name, value in [("threads", threads), *(("batch size", size) for size in batch_sizes)]:
        if value < 1:
            raise RangeError(name, value, "1, 2, 3, ...")


def _makers(
    models: Mapping[str, nn.Module], onnx_files: Mapping[str, str | Path] | None, device: str, threads: int
) -> dict[str, Callable[[str, Any], Runner]]:
    """Give, by backend, what makes the runner of a model for some inputs; files that cannot run fail here."""
    makers: dict[str, Callable[[str, Any], Runner]] = {
        "torch": lambda name, inputs: torch_runner(models[name], inputs),
    }
    if onnx_files:
        sessions = {name: open_session(Path(path), device, threads=threads) for name, path in onnx_files.items()}
        makers["onnxruntime"] = lambda name, inputs: _bound(sessions[name], inputs, torch.device(device))
    return makers


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the machine


def machine() -> dict[str, Any]:
    """Name the machine and the versions that figures were taken with; no host name, no paths."""
    names = ("torch", "torchvision", "onnxruntime", "onnx")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows does not tell
        return None


def _version(name: str) -> str | None:
    """Give the version of an installed package; onnxruntime comes under two names."""
    for distribution in (name, f"{name}-gpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
