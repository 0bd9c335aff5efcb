"""How long every layer of an ONNX file takes in onnxruntime on a CPU, as onnxruntime's own profile has it.

onnxruntime fuses and renames: a `Conv` with the `Relu` behind it runs under the name of what that `Relu` returns. A
layer is found again by its node's name, or by those of what it returns, and of what stands behind it alone:

    node_Conv_54 -> getitem -> node_relu -> relu        runs as `relu_nchwc`
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from compressor.deploy.session import open_session
from compressor.deploy.timing import measure, session_runner

REST = ""  # the name of everything that belongs to no layer
_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_JOINING = ("Add", "Sum", "Mul", "Concat")
_SUFFIXES = ("", "_nchwc")  # what onnxruntime appends where it lays channels out in blocks


@dataclass(frozen=True)
class OnnxLayer:
    """A node with weights.

    Attributes:
        node: its name in the file.
        name: what the model calls it, as far as the file says.
        shape: of its weight, `(D, C / groups, ...)` of convolutions.
    """

    node: str
    name: str
    shape: tuple[int, ...]


def onnx_layers(path: Path) -> list[OnnxLayer]:
    """Return the layers of an ONNX file in the order of its nodes."""
    return _layers(_graph(path))


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False).graph


def _layers(graph: Any) -> list[OnnxLayer]:
    stored = {each.name: tuple(each.dims) for each in graph.initializer}
    found = []
    for node in graph.node:
        weights = [name for name in node.input if name in stored]
        if node.op_type in _WITH_WEIGHTS and weights:
            found.append(OnnxLayer(node.name, weights[0].removesuffix(".weight") or node.name, stored[weights[0]]))
    return found


def layer_times(
    files: Mapping[str, Path], inputs: Tensor, *, threads: int = 1, runs: int = 50, budget_s: float = 10.0
) -> dict[str, dict[str, float]]:
    """Run files in turns under onnxruntime's profiler.

    Args:
        files: by model; each with one input.
        inputs: what they take, `(B, ...)`.
        threads: CPU threads of one operation.
        runs, budget_s: rounds at most, and seconds for all of them; five rounds in any case.

    Returns:
        By model and layer the milliseconds of a call, medians over the rounds; `REST` is all else that runs.
    """
    with TemporaryDirectory() as folder:
        sessions = {
            name: open_session(path, threads=threads, profile=str(Path(folder) / str(number)))
            for number, (name, path) in enumerate(files.items())
        }
        runners = {name: session_runner(session, inputs, torch.device("cpu")) for name, session in sessions.items()}
        measure(runners, runs=runs, min_runs=min(5, runs), budget_s=budget_s)
        profiles = {name: json.loads(Path(each.end_profiling()).read_text()) for name, each in sessions.items()}
    return {name: _by_layer(files[name], events) for name, events in profiles.items()}


def _by_layer(path: Path, events: list[dict[str, Any]]) -> dict[str, float]:
    samples: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            samples[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    ran = {name: median(values) for name, values in samples.items()}
    names = _names(_graph(path), ran)
    times = {layer: sum(ran.pop(name) for name in mine) for layer, mine in names.items()}
    return {**times, REST: sum(ran.values())}


def _names(graph: Any, ran: Collection[str]) -> dict[str, list[str]]:
    """Return, by layer, the names under which it ran, each name once."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    by_name = {node.name: node for node in graph.node}
    layers = {each.name: by_name[each.node] for each in _layers(graph)}
    free = set(ran)
    found: dict[str, list[str]] = {}
    # What two layers flow into may run with either: it goes to the one that is not found under a name of its own.
    for past_joins in (False, True):
        for layer, node in layers.items():
            if not found.get(layer):
                names = (f"{name}{suffix}" for name in _behind(node, readers, past_joins) for suffix in _SUFFIXES)
                found[layer] = [name for name in dict.fromkeys(names) if name in free]
                free.difference_update(found[layer])
    return found


def _behind(node: Any, readers: Mapping[str, list[Any]], past_joins: bool) -> Iterator[str]:
    """Return the names of a node, of what it returns, and so on while one node alone reads that."""
    while True:
        yield node.name
        yield node.output[0]
        following = readers[node.output[0]]
        if len(following) != 1 or following[0].op_type in _WITH_WEIGHTS:
            return
        if following[0].op_type in _JOINING and not past_joins:
            return
        node = following[0]
