"""Weights from a file into a model: all of them, or none. Nothing is unpickled."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import ArtifactError, InputError
from compressor.training.user_code import first_line

logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of a file into the model; all of them, or none where anything does not fit.

    Taken as well, with a warning that says so: a state dict inside of a checkpoint, names that a wrapper put `module.`
    in front of, and a last layer for another number of classes, of which the model keeps its own.

    Args:
        model: takes the values, on its own device and in its own precision.
        path: `.safetensors`, or a `.pt` or `.pth` file of `torch.save(model.state_dict(), path)`. Nothing is unpickled.

    Raises:
        InputError: a file of another kind.
        ArtifactError: the file is missing, damaged, holds more than tensors, or belongs to another model: the first
            tensor that does not fit is named with both shapes, and how many do fit.
    """
    fit_weights(model, _read_tensors(path), path)


def fit_weights(model: nn.Module, given: dict[str, Tensor], source: Path | str) -> None:
    """Write weights by name into the model, as `load_weights` does with those in a file; `source` is for messages."""
    wanted = model.state_dict()
    given = _without_prefix(source, given, wanted)
    given = _without_head(source, model, given, wanted)
    # BatchNorm's batch counter is younger than many published weights, and has no effect on what the model gives.
    kept = {name for name in wanted if name not in given and (name.endswith(".num_batches_tracked"))}
    expected = [name for name in wanted if name not in kept]
    # The model's own tensors first, in their order: the first that differs is where the two models begin to.
    wrong = [name for name in wanted if name in expected and _shape(given, name) != _shape(wanted, name)]
    wrong += [name for name in given if name not in wanted]
    if wrong:
        fitting = sum(_shape(given, name) == _shape(wanted, name) for name in expected)
        raise ArtifactError(_misfit(source, wrong[0], given, wanted, fitting))
    for name in expected:
        _require_kind(source, name, given[name], wanted[name])
    if kept:
        logger.info("%s has no batch counters: %d BatchNorms keep their own", source, len(kept))
    with torch.no_grad():
        for name in expected:
            wanted[name].copy_(given[name])


def _without_prefix(source: Path | str, given: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("module.", "_orig_mod."):  # of DataParallel and DistributedDataParallel, of torch.compile
        if given and all(name.startswith(prefix) for name in given) and not any(n.startswith(prefix) for n in wanted):
            logger.warning("%s: names begin with %r, which a wrapper put there; it is left out", source, prefix)
            return {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    return given


def _without_head(
    source: Path | str, model: nn.Module, given: dict[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the given tensors, with the model's own for a last layer that differs in the number of classes only."""
    heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    head = f"{heads[-1]}." if heads else "."
    differing = [name for name in wanted if name in given and _shape(given, name) != _shape(wanted, name)]
    is_head = differing and all(
        name.startswith(head) and given[name].shape[1:] == wanted[name].shape[1:] for name in differing
    )
    if not is_head:
        return given
    there, here = (len(tensors[differing[0]]) for tensors in (given, wanted))
    logger.warning("%s: %r has %d classes there and %d here; it begins anew", source, head[:-1], there, here)
    return given | {name: wanted[name] for name in differing}


def _require_kind(source: Path | str, name: str, given: Tensor, wanted: Tensor) -> None:
    """Refuse tensors whose values would not be those of weights: whole numbers, complex ones, compressed ones."""
    kinds = [_kind(tensor) for tensor in (given, wanted)]
    if kinds[0] != kinds[1]:
        raise ArtifactError(f"{source}: tensor {name!r} holds {kinds[0]}, and the model {kinds[1]}: convert it first")


def _kind(tensor: Tensor) -> str:
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"a {'quantised' if tensor.is_quantized else 'sparse'} tensor"
    real = "real numbers" if tensor.is_floating_point() else "complex numbers"
    return real if tensor.is_floating_point() or tensor.is_complex() else "whole numbers"


def _misfit(
    source: Path | str, name: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], fitting: int
) -> str:
    there, here = (_shape(tensors, name) if name in tensors else "absent" for tensors in (given, wanted))
    return (
        f"{source} belongs to another model: tensor {name!r} is {there} in the file and {here} in the model; "
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
            f"{path} cannot be read ({_reason(error)}); give a file of tensors only, written by safetensors or by "
            "torch.save(model.state_dict(), path)"
        ) from error
    tensors = _state_dict_in(path, tensors)
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ArtifactError(f"{path} holds other things than tensors by name: save model.state_dict() and give that")
    return {str(name): tensor for name, tensor in tensors.items()}


def _reason(error: Exception) -> str:
    # NOTE: torch advises to load with weights_only=False, which would run whatever the file says.
    return "it holds Python objects" if isinstance(error, pickle.UnpicklingError) else first_line(error)


def _state_dict_in(path: Path, content: object) -> object:
    """Return the state dict that a checkpoint holds under one of the usual names, or the content itself."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            logger.warning("%s: the weights are those under %r", path, key)
            return content[key]
    return content


def _torch_load(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about sparse tensors, which are refused by name
        return torch.load(path, map_location="cpu", weights_only=True)
