"""Models side by side, in PyTorch and in onnxruntime: dense and pruned take turns in one run.

    report = compare({"dense": dense, "pruned": pruned}, (3, 32, 32),
                     onnx_files={"onnxruntime": {"dense": "dense.onnx", "pruned": "small.onnx"}})
    report.comparisons[0].speedup("pruned").ratio

Warm-up is not counted, threads are set and reported, a GPU is waited for, and the machine is named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor._utils import Speedup, device_of, eval_mode, noise, speedup
from compressor.deploy.machine import describe_machine
from compressor.deploy.session import open_session
from compressor.deploy.timing import Latency, Runner, measure, session_runner, torch_runner, torch_threads
from compressor.errors import InputError, RangeError

USUAL_NOISE = 0.03  # the share by which equal models may differ


@dataclass(frozen=True)
class Comparison:
    """Models timed in turns in one place.

    Attributes:
        backend: "torch" or "onnxruntime".
        device, batch_size: where, and how many examples at once.
        latencies: by model, in the order in which they were given.
        control: of the first model once more: what it differs from itself by is noise.
    """

    backend: str
    device: str
    batch_size: int
    latencies: Mapping[str, Latency]
    control: Latency

    def speedup(self, model: str) -> Speedup:
        """Return how many times as fast as the first model this one is: the ratio of the medians, with an interval."""
        # Medians: one call that another process interrupted would move a mean.
        return speedup(next(iter(self.latencies.values())).samples_ms, self.latencies[model].samples_ms)

    @property
    def noise(self) -> float:
        """The share by which the first model differs from itself."""
        return noise(next(iter(self.latencies.values())).samples_ms, self.control.samples_ms)


@dataclass(frozen=True)
class LatencyReport:
    """All comparisons of one run; `threads` CPU threads were used, on `machine`; what makes them doubtful."""

    comparisons: tuple[Comparison, ...]
    threads: int
    machine: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def compare(
    models: Mapping[str, nn.Module],
    example_shape: Sequence[int],
    *,
    onnx_files: Mapping[str, Mapping[str, str | Path]] | None = None,
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
        onnx_files: by backend, `onnxruntime` or `onnxruntime int8` say, the exported file of each model.
        batch_sizes: how many examples at once.
        device: "cpu", "cuda" or "cuda:N", where the models already are.
        threads: CPU threads.
        runs: rounds at most in each place.
        budget_s: seconds for everything. Each batch size gets an equal share, and five rounds in any case.

    Raises:
        InputError: no model, a model on another device, files of other models, or a device that onnxruntime cannot use.
        RangeError: a batch size or a number of threads below 1.
    """
    _check_comparison(models, onnx_files, batch_sizes, device, threads)
    first = next(iter(models))
    share_s = budget_s / len(batch_sizes)
    comparisons = []
    busy = _busy()
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        for model in models.values():
            stack.enter_context(eval_mode(model))
        makers = _makers(models, onnx_files, device, threads)
        for size in batch_sizes:
            # A generator of its own leaves the caller's random state alone.
            inputs = torch.randn(size, *example_shape, generator=torch.Generator().manual_seed(0))
            # All backends in one turn, so that they can be compared too; the first model once more as a control.
            named = {(backend, number): name for backend in makers for number, name in enumerate([*models, first])}
            runners = {key: makers[key[0]](name, inputs) for key, name in named.items()}
            times = measure(runners, runs=runs, min_runs=min(5, runs), budget_s=share_s)
            for backend in makers:
                *own, control = (times[each] for each in named if each[0] == backend)
                comparisons.append(Comparison(backend, device, size, dict(zip(models, own, strict=True)), control))
    comparisons.sort(key=lambda each: list(makers).index(each.backend))
    warnings = (*busy, *(line for each in comparisons for line in _noisy(each)))
    return LatencyReport(tuple(comparisons), threads, describe_machine(), warnings)


def _busy() -> list[str]:
    """Say that other processes have the processors."""
    if not hasattr(os, "getloadavg"):
        return []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return [f"the machine was busy before anything was timed: load {load:.1f} on {cores} cores"] * (load > cores / 2)


def _noisy(comparison: Comparison) -> list[str]:
    """Say that a model differs from itself by more than is usual."""
    if comparison.noise <= USUAL_NOISE:
        return []
    place = f"{comparison.backend}, batch {comparison.batch_size}"
    return [f"noisy: a model and itself differ by {comparison.noise:.1%} in {place}, more than {USUAL_NOISE:.0%}"]


def _check_comparison(
    models: Mapping[str, nn.Module],
    onnx_files: Mapping[str, Mapping[str, str | Path]] | None,
    batch_sizes: Sequence[int],
    device: str,
    threads: int,
) -> None:
    for files in (onnx_files or {}).values():
        if files.keys() != models.keys():
            raise InputError(f"onnx_files are of {list(files)}, and the models {list(models)}: give a file for each")
    for name, model in models.items():
        # The kind only: "cuda" and "cuda:0" are one place.
        if (found := device_of(model)).type != torch.device(device).type:
            raise InputError(
                f"model {name!r} is on {found}, and device is {device!r}: move it with model.to({device!r})"
            )
    for name, value in [("threads", threads), *(("batch size", size) for size in batch_sizes)]:
        if value < 1:
            raise RangeError(name, value, "1, 2, 3, ...")


def _makers(
    models: Mapping[str, nn.Module],
    onnx_files: Mapping[str, Mapping[str, str | Path]] | None,
    device: str,
    threads: int,
) -> dict[str, Callable[[str, Any], Runner]]:
    """Return, by backend, what makes the runner of a model for some inputs; files that cannot run fail here."""
    makers: dict[str, Callable[[str, Any], Runner]] = {
        "torch": lambda name, inputs: torch_runner(models[name], inputs),
    }
    for backend, files in (onnx_files or {}).items():
        # Opened once for all batch sizes, and before PyTorch is timed: a minute later would be late for bad news.
        sessions = {name: open_session(Path(path), device, threads=threads) for name, path in files.items()}
        makers[backend] = partial(_in_session, sessions, torch.device(device))
    return makers


def _in_session(sessions: Mapping[str, Any], device: torch.device, name: str, inputs: Any) -> Runner:
    return session_runner(sessions[name], inputs, device)
