"""One layer alone, timed where it will run: a small ONNX graph around it, and the engine's own clock of each operator.

    pre (1x1, 16 -> in)  ->  the layer, with what is fused behind it  ->  post (1x1, out -> 16)

ONNX Runtime computes convolutions in blocks of channels, and turns its tensors into that layout where a chain of them
begins and back where it ends. The convolutions before and behind keep these turns out of the layer's own time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

import numpy as np

from compressor.deploy.layers import Follower, Kind
from compressor.deploy.place import Place

_OUTSIDE = 16  # channels before and behind: a whole block on every processor that we know
_OPSET, _IR = 20, 9  # Gelu begins with 20
_LEAST_RUNS, _MOST_RUNS, _ENOUGH_NS = 3, 40, 20e6
_AROUND = ("pre", "post", "side", "in", "out")


def onnxruntime_ns(kind: Kind, inputs: int, outputs: int, place: Place) -> float:
    """Return the median time of one layer in ONNX Runtime on this CPU, in nanoseconds.

    Args:
        kind: of layer.
        inputs, outputs: its widths.
        place: how many images at once, and on how many threads.
    """
    import onnxruntime

    model, feeds = fragment(kind, inputs, outputs, place.batch)
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = place.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, feeds)
        runs = 1
        for _ in enough_runs():
            session.run(None, feeds)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text())
    return _median_ns(events, runs)


def enough_runs() -> Iterator[int]:
    """Count runs: as many as fit into a fiftieth of a second, three at least."""
    began = perf_counter_ns()
    for done in range(_MOST_RUNS):
        if done >= _LEAST_RUNS and perf_counter_ns() - began > _ENOUGH_NS:
            return
        yield done


def _median_ns(events: Sequence[dict[str, Any]], runs: int) -> float:
    """Return the median over runs, the first left out, of what the operators between `pre` and `post` took."""
    kernels = [each for each in events if each.get("cat") == "Node" and str(each["name"]).endswith("_kernel_time")]
    inner = [1e3 * each["dur"] for each in kernels if not is_around(str(each["name"]))]
    per_run = len(inner) // runs
    totals = [sum(inner[start : start + per_run]) for start in range(per_run, len(inner), per_run)] if per_run else []
    return median(totals) if totals else 0.0


def is_around(name: str) -> bool:
    """Return whether an operator only surrounds the layer; fused ones are called after the tensor that they return."""
    return name.startswith("Reorder") or re.split(r"[_./]", name)[0] in _AROUND or ".in" in name


def fragment(kind: Kind, inputs: int, outputs: int, batch: int) -> tuple[Any, dict[str, Any]]:
    """Return an ONNX model around one layer, with random weights, and arrays to feed it with."""
    return _Fragment(kind, inputs, outputs, batch).build()


class _Fragment:
    def __init__(self, kind: Kind, inputs: int, outputs: int, batch: int) -> None:
        from onnx import helper

        self.helper = helper
        self.kind, self.inputs, self.outputs, self.batch = kind, inputs, outputs, batch
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.feeds: dict[str, Any] = {}

    def build(self) -> tuple[Any, dict[str, Any]]:
        kind = self.kind
        is_vector = kind.map == (1, 1) and kind.operator in ("Gemm", "Identity")
        if is_vector:
            name = self._fed("in", (self.batch, self.inputs))
            shape: tuple[int, ...] = (self.batch, self.outputs)
        else:
            name = self._outside("pre", self._fed("in", (self.batch, _OUTSIDE, *kind.map)), _OUTSIDE, self.inputs)
            shape = (self.batch, self.outputs, *self._map_after())
        name = self._own(name)
        for number, follower in enumerate(kind.followers):
            name = self._behind(follower, name, shape, f"f{number}")
        if not is_vector:
            name = self._outside("post", name, self.outputs, _OUTSIDE)
        helper = self.helper
        declared = [
            helper.make_tensor_value_info(each, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for each, array in self.feeds.items()
        ]
        result = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(np.float32)), None)
        graph = helper.make_graph(self.nodes, "layer", declared, [result], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR), self.feeds

    def _map_after(self) -> tuple[int, ...]:
        kind = self.kind
        if kind.operator == "ReduceMean":
            return (1, 1)
        sizes = zip(kind.map, kind.kernel, kind.stride, kind.padding, kind.dilation, strict=True)
        return tuple((size + 2 * pad - dil * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dil in sizes)

    def _fed(self, name: str, shape: tuple[int, ...]) -> str:
        self.feeds[name] = self.random.normal(size=shape).astype(np.float32)
        return name

    def _weight(self, name: str, *shape: int) -> str:
        from onnx import numpy_helper

        # Near 1, because denormal numbers take longer; and few are drawn, because a VGG has 100 million.
        drawn = self.random.normal(size=10_007) / math.sqrt(max(1, math.prod(shape[1:])))
        self.weights.append(numpy_helper.from_array(np.resize(drawn.astype(np.float32), shape), name))
        return name

    def _node(self, operator: str, takes: Sequence[str], gives: str, **attributes: Any) -> str:
        self.nodes.append(self.helper.make_node(operator, list(takes), [gives], name=gives, **attributes))
        return gives

    def _outside(self, name: str, of: str, inputs: int, outputs: int) -> str:
        weight = self._weight(f"{name}.w", outputs, inputs, 1, 1)
        return self._node("Conv", [of, weight], name, kernel_shape=[1, 1])

    def _own(self, name: str) -> str:
        kind = self.kind
        if kind.operator == "Conv":
            groups = kind.groups or self.inputs
            takes = [name, self._weight("own.w", self.outputs, self.inputs // groups, *kind.kernel)]
            takes += [self._weight("own.b", self.outputs)] if kind.bias else []
            return self._node(
                "Conv",
                takes,
                "own",
                kernel_shape=kind.kernel,
                strides=kind.stride,
                pads=[*kind.padding, *kind.padding],
                dilations=kind.dilation,
                group=groups,
            )
        if kind.operator == "Gemm":
            takes = [name, self._weight("own.w", self.outputs, self.inputs)]
            takes += [self._weight("own.b", self.outputs)] if kind.bias else []
            return self._node("Gemm", takes, "own", transB=1)
        if kind.operator in ("MaxPool", "AveragePool"):
            pads = [*kind.padding, *kind.padding]
            return self._node(kind.operator, [name], "own", kernel_shape=kind.kernel, strides=kind.stride, pads=pads)
        if kind.operator == "ReduceMean":
            from onnx import numpy_helper

            self.weights.append(numpy_helper.from_array(np.array([2, 3], dtype=np.int64), "own.axes"))
            return self._node("ReduceMean", [name, "own.axes"], "own", keepdims=1)
        return name

    def _behind(self, follower: Follower, name: str, shape: tuple[int, ...], gives: str) -> str:
        if follower.side:
            if len(shape) == 4:
                around = shape[2:] if follower.side == "map" else (1, 1)
                fed = self._fed(f"{gives}.in", (self.batch, _OUTSIDE, *around))
                other = self._outside(f"side_{gives}", fed, _OUTSIDE, self.outputs)
            else:
                other = self._fed(f"{gives}.in", shape)
            return self._node(follower.operator, [name, other], gives)
        values = dict(follower.attributes)
        if follower.operator == "Clip":
            bounds = [self._number(f"{gives}.{which}", values.get(which, bound)) for which, bound in _CLIP]
            return self._node("Clip", [name, *bounds], gives)
        if follower.operator == "Swish":
            gate = self._node("Sigmoid", [name], f"{gives}.gate")
            return self._node("Mul", [name, gate], gives)
        if follower.operator == "HardSigmoid":
            values = {"alpha": 1 / 6, "beta": 0.5}
        return self._node(follower.operator, [name], gives, **values)

    def _number(self, name: str, value: float) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.array(value, dtype=np.float32), name))
        return name


_CLIP = (("min", 0.0), ("max", 6.0))
