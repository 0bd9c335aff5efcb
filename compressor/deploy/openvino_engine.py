"""OpenVINO on the CPU: files opened, timed, and compared; the package is optional (`pip install openvino`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from compressor._utils import named_tensors
from compressor.deploy.fragments import enough_runs, fragment, is_around
from compressor.deploy.layers import Kind
from compressor.deploy.place import Place
from compressor.deploy.timing import Runner
from compressor.errors import ArtifactError, InputError


def has_openvino() -> bool:
    """Return whether OpenVINO is installed here."""
    return importlib.util.find_spec("openvino") is not None


def openvino_version() -> str:
    """Return the version that is installed.

    Raises:
        InputError: none is.
    """
    try:
        import openvino
    except ImportError as error:
        raise InputError("OpenVINO is not installed here: pip install openvino") from error
    return str(openvino.__version__).partition("-")[0]


def open_openvino(model: Path | bytes, threads: int = 1, *, profiles: bool = False) -> Any:
    """Compile an ONNX file for this CPU, in float32.

    Args:
        model: the file, or its content.
        threads: of one operator.
        profiles: whether its requests say how long each operator took.

    Returns:
        An `openvino.CompiledModel`.

    Raises:
        InputError: OpenVINO is not installed.
        ArtifactError: it does not read the file.
    """
    openvino_version()
    import openvino

    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Else bfloat16 where the processor has it, and what is measured and compared would be another network.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": profiles,
    }
    core = openvino.Core()
    try:
        network = core.read_model(model, b"") if isinstance(model, bytes) else core.read_model(str(model))
        return core.compile_model(network, "CPU", options)
    except RuntimeError as error:  # OpenVINO's own exceptions share no other base class
        what = "the network" if isinstance(model, bytes) else model
        raise ArtifactError(f"OpenVINO does not read {what}: {error}") from error


def openvino_runner(path: str | Path, inputs: Any, threads: int = 1) -> Runner:
    """Return a call of an ONNX file in OpenVINO; inputs are set once.

    Args:
        path: the ONNX file.
        inputs: as for the model that was exported.
        threads: of one operator.

    Raises:
        InputError, ArtifactError: as for `open_openvino`.
    """
    compiled = open_openvino(Path(path), threads)
    request = compiled.create_infer_request()
    feeds = {slot.any_name: tensor.cpu().numpy() for slot, (_, tensor) in zip(
        compiled.inputs, named_tensors(inputs), strict=True
    )}  # fmt: skip
    _set(request, feeds)

    def run() -> object:
        request.infer()
        return request

    return run


def _set(request: Any, feeds: Mapping[str, Any]) -> None:
    import openvino

    for name, array in feeds.items():
        request.set_tensor(name, openvino.Tensor(array))


def openvino_ns(kind: Kind, inputs: int, outputs: int, place: Place) -> float:
    """Return the median time of one layer in OpenVINO on this CPU, in nanoseconds; arguments as for onnxruntime_ns."""
    model, feeds = fragment(kind, inputs, outputs, place.batch)
    request = open_openvino(model.SerializeToString(), place.threads, profiles=True).create_infer_request()
    _set(request, feeds)
    request.infer()
    totals: list[float] = []
    for _ in enough_runs():
        request.infer()
        took = {each.node_name: each.real_time.total_seconds() for each in request.profiling_info}
        # Turns into another layout are called after what stands on both sides; a layer keeps its own name.
        inner = [seconds for name, seconds in took.items() if not is_around(name) and "_abcd_" not in name]
        totals.append(1e9 * float(sum(inner)))
    return float(median(totals))
