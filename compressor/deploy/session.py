"""onnxruntime sessions on exactly the device that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compressor.errors import ArtifactError, InputError


def open_session(
    path: Path,
    device: str = "cpu",
    *,
    threads: int = 1,
    tf32: bool = True,
    profile: str = "",
    tensorrt: bool = False,
) -> Any:
    """Open an ONNX file in onnxruntime on exactly this device.

    Args:
        path: the ONNX file.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of one operation.
        profile: how the file begins that `session.end_profiling()` writes and names; empty: none.
        tf32: whether a GPU may round the factors of float32 products to 10 bits, as PyTorch's convolutions do.
        tensorrt: whether TensorRT is to run it, on a GPU.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        InputError: onnxruntime cannot use the device. It would go on silently on the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; it writes to stderr, past Python's logging
    # Idle threads must not spin between two calls: they would slow down whatever is measured in turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_profiling = bool(profile)
    options.profile_file_prefix = profile
    providers = _providers(torch.device(device), tf32, tensorrt)
    # enable_fallback=0: else a GPU that fails is exchanged for the CPU, and a latency is reported of the wrong device.
    session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    if providers[0][0] not in session.get_providers():
        raise InputError(_no_device(device, session.get_providers(), tensorrt))
    return session


def open_file(path: Path, device: str = "cpu", *, threads: int = 1, tensorrt: bool = False) -> Any:
    """Open somebody's ONNX file as `open_session` does, and say it of the file where that cannot be done.

    Raises:
        ArtifactError: there is no such file, or onnxruntime cannot read it.
        InputError: as for `open_session`.
    """
    if not path.is_file():
        raise ArtifactError(f"there is no file {path}: give an ONNX file")
    try:
        return open_session(path, device, threads=threads, tensorrt=tensorrt)
    except InputError:
        raise
    except Exception as error:  # onnxruntime's own exceptions share no base class of their own
        raise ArtifactError(_why_not(path, error)) from error


def _why_not(path: Path, error: Exception) -> str:
    """Return in words why onnxruntime does not open a file; its own text is for those who wrote it."""
    import onnx
    import onnxruntime

    if not path.stat().st_size:
        return f"{path} is empty: export it again"
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # of protobuf's, which has one for each of its implementations
        return f"{path} is no ONNX file that onnxruntime can read: give one"
    if not model.graph.node:
        return f"{path} is no ONNX file that onnxruntime can read, or one without a graph: give one"
    beside = {
        each.value for tensor in model.graph.initializer for each in tensor.external_data if each.key == "location"
    }
    gone = sorted(name for name in beside if not (path.parent / name).is_file())
    if gone:
        return f"{path} keeps weights in {', '.join(gone)}, which is not beside it: put it there"
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    if opset > onnx.defs.onnx_opset_version():
        return f"{path} is of opset {opset}, which onnxruntime {onnxruntime.__version__} does not know: export it lower"
    said = str(error).strip().partition("\n")[0]
    return f"{path} is no ONNX file that onnxruntime can read: {said}"


def _providers(device: torch.device, tf32: bool, tensorrt: bool) -> list[tuple[str, dict[str, str]]]:
    """Return who runs the operations, the first that knows one; what none of them knows onnxruntime gives to the CPU.

    Behind TensorRT that is CUDA, or a single operation that TensorRT lacks would cost two copies over the bus.
    """
    import onnxruntime

    if device.type == "cpu" and tensorrt:
        raise InputError("TensorRT runs on a GPU: give the device cuda, or another engine for cpu")
    if device.type == "cpu":
        return [("CPUExecutionProvider", {})]
    name = "TensorrtExecutionProvider" if tensorrt else "CUDAExecutionProvider"
    offered = onnxruntime.get_available_providers()
    # Without a GPU, onnxruntime offers the provider all the same, and writes to stderr; built for CPUs alone it warns.
    if device.type != "cuda" or not torch.cuda.is_available() or name not in offered:
        raise InputError(_no_device(str(device), ["CPUExecutionProvider"], tensorrt))
    onnxruntime.preload_dlls()  # the CUDA libraries that came with PyTorch
    index = str(device.index or 0)
    by_cuda = ("CUDAExecutionProvider", {"device_id": index, "use_tf32": str(int(tf32))})
    return [(name, {"device_id": index}), by_cuda] if tensorrt else [by_cuda]


def _no_device(device: str, providers: list[str], tensorrt: bool) -> str:
    if tensorrt:
        return (
            f"TensorRT does not run in onnxruntime on {device!r} here (it has {', '.join(providers)}): install "
            "onnxruntime-gpu, tensorrt and a driver for the GPU, or give another engine"
        )
    return (
        f"onnxruntime cannot run on {device!r} here (it has {', '.join(providers)}): give device='cpu', or install "
        "onnxruntime-gpu and a driver for the GPU"
    )
