"""Milliseconds of anything that can be called: runners take turns, so that whatever else happens hits all alike.

    times = measure({"dense": torch_runner(dense, inputs), "pruned": torch_runner(pruned, inputs)})
    times["pruned"].p50_ms

A machine slows down when it gets warm and when others use it. Timed one after the other, dense in a quiet minute and
pruned in a busy one, 2.0 and 1.8 ms say nothing; in turns, D P P D, both have the same neighbours.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import nn

from compressor._utils import as_arguments, device_of, named_tensors, percentile, to_device
from compressor.deploy.session import open_session
from compressor.errors import InputError, RangeError

logger = logging.getLogger(__name__)

Runner = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

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
        return sum(self.samples_ms) / len(self.samples_ms)

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
        """Return a percentile, `q` in [0, 100]; 0 is the shortest call and 100 the longest."""
        return percentile(self.samples_ms, q)


def measure(
    runners: Mapping[Key, Runner], *, runs: int = 200, min_runs: int = 5, warmup: int = 10, budget_s: float = 10.0
) -> dict[Key, Latency]:
    """Time runners in turns, in an order drawn anew for every two rounds, the second backwards: B A C C A B, ...

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
    # All are warmed up before the first is timed: a first call allocates, compiles and picks its kernels, and doing so
    # in the middle would slow down the call of another.
    for _ in _rounds(warmup, 1, start + WARM_UP_SHARE * budget_s):
        for run in runners.values():
            run()
    samples: dict[Key, list[float]] = {name: [] for name in runners}
    # Backwards, because a machine drifts. Drawn anew, because what a call leaves in the caches is there for the next
    # one: in a fixed order the first and the last would follow themselves, and those between them others alone.
    drawn, order = random.Random(0), list(runners.items())
    for number in _rounds(runs, min_runs, start + budget_s):
        if number % 2:
            order.reverse()
        else:
            drawn.shuffle(order)
        for name, run in order:
            began = perf_counter()
            run()
            samples[name].append(1e3 * (perf_counter() - began))
    times = {name: Latency(tuple(values)) for name, values in samples.items()}
    done = len(next(iter(samples.values())))
    if done < runs:
        logger.info("time was up after %d of %d rounds", done, runs)
    return times


def _check_plan(runs: int, min_runs: int, warmup: int, budget_s: float) -> None:
    for name, value, least in (("min_runs", min_runs, 1), ("runs", runs, min_runs), ("warmup", warmup, 1)):
        if value < least:
            raise RangeError(name, value, f"{least}, {least + 1}, ...")
    if not budget_s > 0:
        raise RangeError("budget_s", budget_s, "(0, inf)")


def _rounds(most: int, least: int, deadline: float) -> Iterator[int]:
    """Count rounds until there are enough, or time is up."""
    # Whole rounds only: every runner is called equally often.
    for done in range(most):
        if done >= least and perf_counter() >= deadline:
            return
        yield done


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use so many CPU threads for one operation inside the `with`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- what can be timed


def torch_runner(model: nn.Module, inputs: Any, *, as_graph: bool = False) -> Runner:
    """Return a call of the model that returns when the result is there.

    Args:
        model: in evaluation mode.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments; they are put on the model's device.
        as_graph: replay its kernels as one CUDA graph, see `cuda_graph`.

    Raises:
        InputError: the model is in training mode; timing it would change its BatchNorm statistics. A CUDA graph of a
            model that is on no GPU.
    """
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode: call model.eval() before timing it")
    device = device_of(model)
    args, kwargs = as_arguments(to_device(inputs, device))

    def call() -> object:
        with torch.inference_mode():
            return model(*args, **kwargs)

    if as_graph:
        if device.type != "cuda":
            raise InputError(f"a CUDA graph of a model on {device}: put it on a GPU first, or leave as_graph out")
        with torch.cuda.device(device):
            return cuda_graph(call)

    def run() -> object:
        result = call()
        # CUDA returns as soon as the work is in its queue.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return run


def cuda_graph(call: Callable[[], object], times: int = 1) -> Runner:
    """Return what replays the kernels of a call on the current GPU as one CUDA graph, and waits for them.

    Called from Python, a small network takes as long as it takes to launch its kernels, and a pruned one as many:
    measured on an H200, ResNet-18 at batch 1, 2.2 ms either way, of which its kernels need 0.4.

    Args:
        call: always the same work on the same memory.
        times: how often one replay does it.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())  # which may still be writing what the call reads
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):  # a capture must not choose algorithms
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(times):
                call()

    return partial(_replay, graph, torch.cuda.current_device(), call)


def _replay(graph: torch.cuda.CUDAGraph, device: int, call: Callable[[], object]) -> object:
    """Run a graph, and wait for it; whoever holds this holds `call` too, whose model and inputs the kernels read."""
    graph.replay()
    torch.cuda.synchronize(device)
    return call


def onnx_runner(path: str | Path, inputs: Any, device: str = "cpu", *, threads: int = 1) -> Runner:
    """Return a call of an ONNX file in onnxruntime; inputs and outputs stay on the device.

    Args:
        path: the ONNX file.
        inputs: as for the model that was exported.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of one operation.

    Raises:
        InputError: onnxruntime cannot use the device.
    """
    return session_runner(open_session(Path(path), device, threads=threads), inputs, torch.device(device))


def session_runner(session: Any, inputs: Any, device: torch.device) -> Runner:
    """Return a call of an open session; inputs and outputs are bound to the device once, a call copies nothing."""
    from onnxruntime import OrtValue

    binding = session.io_binding()
    place = (device.type, device.index or 0)
    for slot, (_, tensor) in zip(session.get_inputs(), named_tensors(inputs), strict=True):
        binding.bind_ortvalue_input(slot.name, OrtValue.ortvalue_from_numpy(tensor.cpu().numpy(), *place))
    # Memory for the outputs is left to onnxruntime: their size is known only when it runs.
    for slot in session.get_outputs():
        binding.bind_output(slot.name, *place)
    binding.synchronize_inputs()

    def run() -> object:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding

    return run
