"""Latency as what a budget counts: predicted from a table of layers, and measured on the whole network at the end.

cost = compressor.LatencyCost(compressor.Place("onnxruntime", batch=1, threads=1))
compressor.prune(model, inputs, "l1", compressor.Budget(0.5, cost))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from compressor.deploy.export import exported_aside
from compressor.deploy.latency_table import LatencyTable, Progress, Widest
from compressor.deploy.layers import Layer, fused_layers
from compressor.deploy.openvino_engine import openvino_runner
from compressor.deploy.place import Place
from compressor.deploy.timing import measure, onnx_runner, torch_runner, torch_threads
from compressor.errors import InputError
from compressor.graph import ChannelGraph, Extent, copied

IntArray: TypeAlias = NDArray[np.int64]

_FAR_OFF = 0.1  # of the measured time: the table says too little of such a network
_RUNS, _SECONDS = 60, 8.0


@dataclass(eq=False)
class LatencyCost:
    """Nanoseconds of a forward pass in one place, as a cost that a `Budget` can count.

    Attributes:
        place: where the network is to run.
        on_progress: called with the layers measured so far and their number.
        is_measured: whether a pruning measures the whole network, and cuts on; else the prediction decides.
    """

    place: Place = field(default_factory=Place)
    on_progress: Progress = lambda done, total: None
    is_measured: bool = True
    name: str = field(default="latency", init=False)

    @cached_property
    def table(self) -> LatencyTable:
        """The measured layers of this machine, kept in the user's cache."""
        return LatencyTable(self.place)

    @property
    def aligned(self) -> int:
        """The multiple of channels at which something is won."""
        return self.table.step

    def count(self, graph: ChannelGraph) -> Callable[[IntArray], IntArray]:
        """Return what predicts the time: takes kept channels `(B, G)` in the order of the groups, returns `(B,)`.

        Raises:
            InputError: nothing of the network is a layer that can be measured, or no convolution of it is; or it is
                not in single precision.
        """
        kinds = {str(each.dtype).removeprefix("torch.") for each in graph.model.parameters()}
        if kinds - {"float32"}:
            raise InputError(
                f"layers are timed in float32, and the model is in {', '.join(sorted(kinds))}: cut model.float()"
            )
        layers, unknown = fused_layers(graph)
        # Of a network of Conv1d its classifier is a layer; what a cut saves is not known by that.
        has_others = any(each.startswith("convolution ") for each in unknown)
        if not layers or (has_others and all(layer.kind.operator != "Conv" for layer in layers)):
            found = ", ".join(unknown[:3]) or "nothing"
            raise InputError(
                "no layer of this network can be timed alone, or no convolution: latency is known of networks of "
                f"two-dimensional convolutions and linear layers; give --measure macs (found {found})"
            )
        names = list(graph.sizes())
        widest = [_widest(layer, graph.sizes()) for layer in layers]
        self.table.prepare(widest, self.on_progress)
        known = [(_Width(each.inputs, names), _Width(each.outputs, names)) for each in layers]
        surfaces = [self.table.surface(each) for each in widest]

        def predict(kept: IntArray) -> IntArray:
            total = np.zeros(len(kept))
            for (inputs, outputs), surface in zip(known, surfaces, strict=True):
                total += surface(inputs(kept), outputs(kept))
            return np.rint(total).astype(np.int64)

        return predict

    def watch(self, graph: ChannelGraph) -> Callable[[], Measured] | None:
        """Return what measures the whole network as it is then against how it is now, in turns."""
        if not self.is_measured:
            return None
        before = _Frozen(graph, self.place)

        def look() -> Measured:
            runners = {"before": before.runner, "now": _Frozen(graph, self.place).runner}
            with torch_threads(self.place.threads):
                times = measure(runners, runs=_RUNS, min_runs=7, warmup=3, budget_s=_SECONDS)
            return Measured(times["before"].p50_ms, times["now"].p50_ms, self.place.describe())

        return look


@dataclass(frozen=True)
class Measured:
    """Median milliseconds of a network before and after, measured in turns, and where."""

    before: float
    after: float
    place: str

    @property
    def removed(self) -> float:
        """The share that is gone."""
        return 1 - self.after / self.before

    def says(self, asked: float, predicted: float) -> str:
        """Return wanted, predicted and got in one line."""
        return (
            f"latency: {asked:.1%} less asked, {predicted:.1%} predicted, {self.removed:.1%} measured "
            f"({self.before:.2f} to {self.after:.2f} ms; {self.place})"
        )

    def warning(self, predicted: int) -> str:
        """Return what to know of a prediction, in nanoseconds, that is far from the measured time; else nothing."""
        off = predicted / 1e6 / self.after - 1
        if abs(off) <= _FAR_OFF:
            return ""
        return (
            f"the layers' table says {predicted / 1e6:.2f} ms, and the whole network takes {self.after:.2f} ms: "
            f"{off:+.0%}, more than {_FAR_OFF:.0%} apart"
        )


class _Frozen:
    """A network as it is now, in its engine."""

    def __init__(self, graph: ChannelGraph, place: Place) -> None:
        inputs = tree_map(lambda tensor: _of(tensor, place.batch), graph.example_inputs)
        if place.engine == "torch":
            model = copied(graph.model).eval().to(place.device)
            self.runner = torch_runner(model, inputs, as_graph=place.device == "cuda")
            return
        with exported_aside(graph.model, graph.example_inputs) as path:
            if place.engine == "openvino":
                self.runner = openvino_runner(path, inputs, place.threads)
            else:
                self.runner = onnx_runner(path, inputs, threads=place.threads)


def _of(tensor: Tensor, batch: int) -> Tensor:
    """Return as many examples as asked, the ones that there are in turns."""
    return tensor[torch.arange(batch) % len(tensor)]


def _widest(layer: Layer, sizes: dict[str, int]) -> Widest:
    inputs, outputs = (
        each.fixed + sum(times * sizes[name] for name, times in each.per_channel.items())
        for each in (layer.inputs, layer.outputs)
    )
    return Widest(layer.kind, inputs, outputs, (bool(layer.inputs.per_channel), bool(layer.outputs.per_channel)))


class _Width:
    """The width of an axis as a function of kept channels."""

    def __init__(self, extent: Extent, names: list[str]) -> None:
        self._fixed = extent.fixed
        self._columns = [names.index(name) for name in extent.per_channel]
        self._times = np.array(list(extent.per_channel.values()), dtype=np.int64)

    def __call__(self, kept: IntArray) -> IntArray:
        width: IntArray = self._fixed + kept[:, self._columns] @ self._times
        return width
