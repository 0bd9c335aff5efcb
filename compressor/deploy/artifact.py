"""Save a model and load it again, smaller than its factory makes it, without running what a file says.

    save(model, "small.safetensors")              a ResNet-18 whose layer1.0.conv1 has 40 channels left of 64
    load("small.safetensors")                     builds ResNet-18, narrows that layer to 40, copies the values

A factory outside torchvision is only ever the caller's: a file cannot name code to run.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor._utils import memory_format, unwrap_compiled
from compressor.deploy import model_file
from compressor.deploy.machine import versions
from compressor.deploy.model_file import Description
from compressor.errors import ArtifactError, InputError
from compressor.graph import (
    all_numeric_attributes,
    is_numeric,
    numeric_attributes,
    restore_shapes,
    set_numeric_attributes,
)
from compressor.training import ModelSpec

logger = logging.getLogger(__name__)

# -- saving


def save(
    model: nn.Module, path: str | Path, *, spec: ModelSpec | None = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model's weights and structure to one safetensors file, beside `path` and then renamed.

    Parameters, all buffers and plain numbers among the modules' attributes are kept; training mode, gradients and
    `requires_grad` are not.

    Args:
        model: the model, pruned or not; it is not changed.
        path: the file; `.safetensors` is the usual ending.
        spec: how to build the dense model; by default `model.compressor_spec`, which `compressor.training.models.build`
            leaves there. Without either, `load` needs a factory.
        extra: more to keep, as JSON values; `describe(path).extra` returns it.

    Raises:
        InputError: the spec builds another model, `extra` is not JSON, or the path cannot be written. A file that is
            there already is left alone.
    """
    model = unwrap_compiled(model)
    spec = spec or getattr(model, "compressor_spec", None)
    if spec is None:
        logger.info("%s has no spec: loading %s will need a factory", type(model).__name__, path)
    tensors = _tensors(model)
    _refuse_extra_state(model)
    content = {
        "spec": dataclasses.asdict(spec) if spec else None,
        "cut": _cut(spec, tensors) if spec else {},
        "attributes": all_numeric_attributes(model),
        "channels_last": [name for name, tensor in tensors.items() if memory_format(tensor) is torch.channels_last],
        "extra": dict(extra or {}),
        "versions": versions(),
    }
    model_file.write(Path(path), content, tensors)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and all buffers by name; tied ones once."""
    # Buffers that a state_dict leaves out too: a mask that was cut is narrower than the factory would make it.
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _refuse_extra_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        # Overridden at all: what it returns may be any object, and only pickle could keep that.
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise InputError(
                f"module {name!r} ({type(module).__name__}) has state that is no tensor (get_extra_state), and would "
                "be loaded without it; make it a buffer"
            )


def _cut(spec: ModelSpec, live: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the dense shapes of what is smaller now."""
    # The dense model is built here, not only when loading: that the spec does not fit must be known while the model is.
    dense = {name: tuple(tensor.shape) for name, tensor in _tensors(spec.build(seed=0)).items()}
    if differing := sorted(dense.keys() ^ live.keys()):
        where = "the model" if differing[0] in live else f"what {spec} builds"
        raise InputError(
            f"this model is not {spec.factory!r} any more: {differing[0]!r} is only in {where}; "
            "give another spec, or `del model.compressor_spec` and load it with load(path, factory=...)"
        )
    return {name: shape for name, shape in dense.items() if shape != tuple(live[name].shape)}


# -- loading


def load(path: str | Path, *, factory: Callable[[], nn.Module] | None = None, device: str = "cpu") -> nn.Module:
    """Build the model that a file holds, in evaluation mode; its outputs are bit for bit those of the saved one.

    Args:
        path: a file that `save` wrote.
        factory: returns the dense model; needed where the file does not name a torchvision model. It goes before what
            the file names.
        device: where the model is put.

    Raises:
        ArtifactError: the file is missing, damaged, of another project or of a newer compressor, belongs to another
            model than the factory returns, or needs a factory.
    """
    path = Path(path)
    description, tensors = model_file.read(path)
    model = _dense(path, description, factory)
    _fit(path, model, description)
    for name, tensor in _tensors(model).items():
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            kinds = (str(each.dtype).removeprefix("torch.") for each in (tensors[name], tensor))
            raise ArtifactError("{}: tensor {!r} is {} there, and {} in the model".format(path, name, *kinds))
        # In the memory format of the saved model: other kernels would add up in another order.
        last = name in description.channels_last and tensor.dim() == 4
        tensor.data = tensors[name].clone(memory_format=torch.channels_last if last else torch.contiguous_format)
    return model.to(device).eval()


def describe(path: str | Path) -> Description:
    """Return what a model file says about itself; the file is checked in full, and no model is built.

    Raises:
        ArtifactError: the file is missing, damaged, of another project or of a newer compressor.
    """
    return model_file.read(Path(path))[0]


def _dense(path: Path, description: Description, factory: Callable[[], nn.Module] | None) -> nn.Module:
    """Build the dense model, by the caller's factory or by torchvision's; the random state stays as it was."""
    if factory is not None:
        with torch.random.fork_rng(devices=[]):
            model = factory()
        if not isinstance(model, nn.Module):
            raise InputError(f"factory gave a {type(model).__name__}: give a callable that gives the dense model")
        return model
    if description.spec is None:
        raise ArtifactError(f"{path} does not say how to build its model: load(path, factory=...)")
    try:
        spec = ModelSpec(**description.spec)
        if not spec.names_code:
            _require_plausible(path, spec, description)
            return spec.build(seed=0)
    except (InputError, TypeError, RuntimeError) as error:  # RuntimeError: more classes than memory holds
        raise ArtifactError(f"{path} names no model that can be built: {error}; load(path, factory=...)") from error
    raise ArtifactError(f"{path} names {spec.factory!r}, and no file decides what is imported: load(path, factory=...)")


def _require_plausible(path: Path, spec: ModelSpec, description: Description) -> None:
    """Refuse a file that names another model than it holds, before memory is taken for what it names."""
    dense = {**description.shapes, **description.cut}
    for what, count, dim in (("classes", spec.classes, 0), ("in_channels", spec.in_channels, 1)):
        if all(count != size for shape in dense.values() for size in shape[dim : dim + 1]):
            raise ArtifactError(f"{path} names {spec.factory} with {count:,} {what}, and holds no such tensor")
    size, here = (sum(map(math.prod, shapes.values())) for shapes in (dense, description.shapes))
    if size > _LARGEST_RATIO * max(here, 1):
        raise ArtifactError(f"{path} names a model of {size:,} numbers, and holds {here:,} of them: it is damaged")


_LARGEST_RATIO = 10_000  # no pruning leaves less than one number in so many


def _fit(path: Path, model: nn.Module, description: Description) -> None:
    """Narrow the dense model and set the attributes that shapes do not tell."""
    try:
        restore_shapes(model, description.shapes)
    except InputError as error:
        raise ArtifactError(f"{path} holds another model than {type(model).__name__}: {error}") from error
    modules = dict(model.named_modules())
    for name, attributes in description.attributes.items():
        # Only numbers that the factory's model has too: a file must not put `forward` or a new attribute on a module.
        known = numeric_attributes(modules[name]) if name in modules else {}
        for attribute, value in attributes.items():
            if attribute not in known or not is_numeric(value):
                where = f"{name}.{attribute}".strip(".")
                raise ArtifactError(f"{path} holds another model than {type(model).__name__}: {where} = {value!r}")
            set_numeric_attributes(modules[name], {attribute: value})
