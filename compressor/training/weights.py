"""Weights from a file into a model: all of them, or none. Nothing is unpickled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import ArtifactError, InputError
from compressor.training.models import first_line

logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of a file into the model; all of them, or none where anything does not fit.

    Args:
        model: takes the values, on its own device and in its own precision.
        path: `.safetensors`, or a `.pt` or `.pth` file of `torch.save(model.state_dict(), path)`. Nothing is unpickled.

    Raises:
        InputError: a file of another kind.
        ArtifactError: the file is missing, damaged, holds more than tensors, or belongs to another model: the first
            tensor that does not fit is named with both shapes, and how many do fit.
    """
    given = _read_tensors(path)
    wanted = model.state_dict()
    # BatchNorm's batch counter is younger than many published weights, and has no effect on what the model gives.
    expected = {name for name in wanted if name in given or not name.endswith(".num_batches_tracked")}
    # The model's own tensors first, in their order: the first that differs is where the two models begin to.
    wrong = [name for name in wanted if name in expected and _shape(given, name) != _shape(wanted, name)]
    wrong += [name for name in given if name not in wanted]
    if wrong:
        fitting = sum(_shape(given, name) == _shape(wanted, name) for name in expected)
        raise ArtifactError(_misfit(path, wrong[0], given, wanted, fitting))
    if left := wanted.keys() - expected:
        logger.info("%s has no batch counters: %d BatchNorms keep their own", path, len(left))
    with torch.no_grad():
        for name in expected:
            wanted[name].copy_(given[name])


def _misfit(path: Path, name: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], fitting: int) -> str:
    there, here = (_shape(tensors, name) if name in tensors else "absent" for tensors in (given, wanted))
    return (
        f"{path} belongs to another model: tensor {name!r} is {there} in the file and {here} in the model; "
        f"{fitting} of the model's {len(wanted)} tensors fit. Give weights of the same model, stem and classes"
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    readers: dict[str, Callable[[Path], object]] = {".safetensors": load_file, ".pt": _torch_load, ".pth": _torch_load}
    if path.suffix not in readers:
        raise InputError(f"{path} is no weights file: give one that ends in {', '.join(readers)}")
    if not path.is_file():
        raise ArtifactError(f"there is no weights file {path}")
    try:
        tensors = readers[path.suffix](path)
    except Exception as error:  # a damaged file makes the readers raise whatever their parser stumbles over
        raise ArtifactError(
            f"{path} cannot be read ({first_line(error)}); give a file of tensors only, written by safetensors or by "
            "torch.save(model.state_dict(), path)"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ArtifactError(f"{path} holds other things than tensors by name: save model.state_dict() and give that")
    return dict(tensors)


def _torch_load(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)
