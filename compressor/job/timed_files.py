"""Models in files, timed side by side: each kind of file in the engines that run it.

run/                  dense.onnx and model.onnx
small.onnx            onnxruntime, openvino, tensorrt
small.safetensors     torch, torch.compile
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressor._utils import noise
from compressor.deploy import (
    Latency,
    Runner,
    describe_machine,
    example_inputs,
    measure,
    open_file,
    openvino_runner,
    peak_memory,
    session_runner,
    torch_runner,
)
from compressor.errors import InputError, UnknownNameError
from compressor.job.capacity import require_memory, require_threads
from compressor.job.device import require_compiler, usable_device
from compressor.job.saved import Shape, example, loaded

_TOO_MUCH = "this machine has too little memory for {} images at once: give a smaller --batch-size or --image-size"


@dataclass(frozen=True)
class Timed:
    """How long a model in a file takes, and for inputs of which shapes, the batch included.

    Attributes:
        latency, shapes: as said.
        memory_bytes: by how much a process grows that runs it; known of onnxruntime on a CPU.
    """

    latency: Latency
    shapes: tuple[Shape, ...]
    memory_bytes: int | None


def timed(
    files: list[Path],
    batch_size: int,
    device: str,
    threads: int,
    factory: str,
    image_size: int | None,
    engines: Sequence[str] = (),
) -> tuple[dict[str, Timed], float]:
    """Time models in files in turns, each in those of the engines that its kind of file runs in.

    Args:
        files: .safetensors and .onnx files, and run folders, which stand for the ONNX files of both models.
        batch_size, device, threads: as for `compare`.
        factory, image_size: as for `loaded`.
        engines: by name; without one for a kind of file onnxruntime or torch.

    Returns:
        The times by file, and the share by which the first one, timed once more, differs from itself.

    Raises:
        UnknownNameError: an engine that there is not.
        InputError: files of another kind, an engine that fits none, or a device that cannot be used.
        ArtifactError: a file that cannot be read.
    """
    require_threads(threads)
    files = [each for file in files for each in _of_run(file)]
    makers = _makers(files, engines, factory, threads)
    device = usable_device(device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = {
            f"{file} ({name})" if len(makers[file.suffix]) > 1 else str(file): make(
                file, batch_size, device, image_size
            )
            for file in files
            for name, make in makers[file.suffix].items()
        }
        runners = [each.runner for each in made.values()]
        *own, control = measure(dict(enumerate([*runners, runners[0]]))).values()
        timed_files = {
            # Other processes after the timing: they would disturb it.
            name: Timed(times, each.shapes, each.memory())
            for (name, each), times in zip(made.items(), own, strict=True)
        }
        return timed_files, noise(own[0].samples_ms, control.samples_ms)
    except MemoryError as error:
        raise InputError(_TOO_MUCH.format(batch_size)) from error
    except RuntimeError as error:  # torch and onnxruntime have no class of their own for it on a CPU
        if "alloc" not in str(error):
            raise
        raise InputError(_TOO_MUCH.format(batch_size)) from error
    finally:
        torch.set_num_threads(before)


def as_content(batches: Sequence[tuple[int, Mapping[str, Timed], float]], device: str, threads: int) -> dict[str, Any]:
    """Return what was timed, JSON-able, with every sample; `batches` are sizes, times by file, and the noise."""
    return {
        "format": "compressor-benchmark",
        "version": 1,
        "machine": describe_machine(),
        "device": device,
        "threads": threads,
        "batches": [
            {
                "batch_size": size,
                "noise": noise,
                "files": {
                    name: {
                        "shapes": each.shapes,
                        "p50_ms": each.latency.p50_ms,
                        "samples_ms": each.latency.samples_ms,
                        "memory_bytes": each.memory_bytes,
                    }
                    for name, each in times.items()
                },
            }
            for size, times, noise in batches
        ],
    }


def _of_run(file: Path) -> list[Path]:
    """Return the ONNX files in a run folder, that of the dense model first; any other file is itself."""
    found = [each for each in (file / "dense.onnx", file / "model.onnx") if each.is_file()]
    return found or [file]


_Maker = Callable[[Path, int, str, int | None], "_Made"]


def _makers(files: Sequence[Path], engines: Sequence[str], factory: str, threads: int) -> dict[str, dict[str, _Maker]]:
    """Return, by ending and by engine, what makes a file ready to run."""
    known: dict[str, dict[str, _Maker]] = {
        ".safetensors": {
            "torch": partial(_in_torch, factory=factory),
            "torch.compile": partial(_in_torch, factory=factory, compiled=True),
        },
        ".onnx": {
            "onnxruntime": partial(_in_onnxruntime, threads=threads),
            "openvino": partial(_in_openvino, threads=threads),
            "tensorrt": partial(_in_onnxruntime, threads=threads, tensorrt=True),
        },
    }
    for file in files:
        if file.suffix not in known:
            raise InputError(f"{file} is no model file: give a run folder, or one that ends in {' or '.join(known)}")
    endings = {file.suffix for file in files}
    every = [name for each in known.values() for name in each]
    for name in engines:
        if name not in every:
            raise UnknownNameError("engine", name, every)
        ending = next(ending for ending, each in known.items() if name in each)
        if ending not in endings:
            raise InputError(f"--engine {name} runs {ending} files, and there is none: leave it out, or give one")
    chosen = {ending: {name: each[name] for name in each if name in engines} for ending, each in known.items()}
    return {ending: each or dict(list(known[ending].items())[:1]) for ending, each in chosen.items()}


@dataclass(frozen=True)
class _Made:
    """A file that is ready to run, and what its memory is asked of, where it can be."""

    runner: Runner
    shapes: tuple[Shape, ...]
    memory: Callable[[], int | None] = lambda: None


def _in_torch(
    file: Path, batch_size: int, device: str, image_size: int | None, *, factory: str, compiled: bool = False
) -> _Made:
    model, shape = loaded(file, factory, image_size)
    require_memory((batch_size, *shape))
    images = example(model, shape, batch_size)
    if compiled:
        require_compiler(device, "engine torch.compile")
    model = cast(nn.Module, torch.compile(model.to(device))) if compiled else model.to(device)
    return _Made(torch_runner(model, images), ((batch_size, *shape),))


def _in_onnxruntime(
    file: Path, batch_size: int, device: str, image_size: int | None, *, threads: int, tensorrt: bool = False
) -> _Made:
    session = open_file(file, device, threads=threads, tensorrt=tensorrt)
    inputs = example_inputs(session, batch_size, image_size, name=str(file), check=require_memory)
    runner, shapes = session_runner(session, inputs, torch.device(device)), _shapes(inputs)
    if device != "cpu":
        return _Made(runner, shapes)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return _Made(runner, shapes, partial(peak_memory, file, arrays, threads))


def _in_openvino(file: Path, batch_size: int, device: str, image_size: int | None, *, threads: int) -> _Made:
    if device != "cpu":
        raise InputError(f"OpenVINO is timed on the CPU: give --device cpu, or --engine onnxruntime for {device}")
    inputs = example_inputs(open_file(file), batch_size, image_size, name=str(file), check=require_memory)
    return _Made(openvino_runner(file, inputs, threads), _shapes(inputs))


def _shapes(inputs: Mapping[str, Tensor]) -> tuple[Shape, ...]:
    return tuple(tuple(each.shape) for each in inputs.values())
