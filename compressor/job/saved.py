"""Models in files, taken up again: what `compress inspect`, `export` and `benchmark` begin with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from compressor.deploy import (
    Description,
    ImageModel,
    describe,
    load,
    open_file,
)
from compressor.errors import ArtifactError, InputError
from compressor.job.capacity import require_memory
from compressor.training import models

Shape = tuple[int, ...]  # of one image, (C, H, W)


def about(
    path: Path, image_size: int | None = None, *, takes_pixels: bool = False
) -> tuple[ImageModel, dict[str, Any]]:
    """Return what an ONNX file made of a saved model is to say about itself.

    Args:
        path: a file that compressor saved.
        image_size: height and width; by default what the run had.
        takes_pixels: whether normalisation and softmax are to be a part of it.

    Raises:
        ArtifactError: the file cannot be used.
        InputError: pixels are to be taken, and it does not say by what they are normalised.
    """
    description = describe(path)
    extra = _extra(path, description)
    channels, height, width = extra.image_shape
    shape = (channels, image_size or height, image_size or width)
    if takes_pixels and not len(extra.mean) == len(extra.std) == channels:
        raise InputError(f"{path} does not say by what its images are normalised: leave out --preprocess")
    made = ImageModel(shape, extra.classes, extra.mean, extra.std, takes_pixels)
    return made, {"versions": description.versions, **extra.result}


def trained_on(path: Path) -> tuple[str, int]:
    """Return the data set that a file's model was trained on, empty if it does not say, and the seed that split it.

    With another seed the validation part would hold images that it learnt from.
    """
    known = _extra(path, describe(path)).result if path.suffix == ".safetensors" else props(path)
    seed = str(known.get("seed", 0))
    return str(known.get("data", "")), int(seed) if seed.isdecimal() else 0


def loaded(path: Path, factory: str = "", image_size: int | None = None) -> tuple[nn.Module, Shape]:
    """Return the model in a .safetensors file, in evaluation mode, and the shape of its images.

    Args:
        path: a file that compressor saved.
        factory: `package.module:factory` that gives the dense model, where the file names no torchvision model.
        image_size: height and width; by default what the run that made the file had, else 224.

    Raises:
        ArtifactError: the file cannot be used.
        InputError: the factory is missing or does not work.
    """
    description = describe(path)
    built_by = (description.spec or {}).get("factory", "")
    if not factory and (not built_by or models.names_code(built_by)):
        named = f" (it names {built_by})" if built_by else ""
        raise InputError(
            f"{path} needs the factory of its model, and no file decides what is imported: "
            f"give --factory package.module:factory{named}"
        )
    make = partial(models.build, factory, classes=_classes(path, description)) if factory else None
    channels, height, width = _extra(path, description).image_shape
    shape = (channels, image_size or height, image_size or width)
    require_memory((1, *shape))
    return load(path, factory=make), shape


def example(model: nn.Module, shape: Shape, batch_size: int = 1) -> Tensor:
    """Return noise for a model to run on, `(batch_size, *shape)`, in the precision of its weights."""
    weights = (each for each in model.parameters() if each.is_floating_point())
    images = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(next(weights, images).dtype)


def pixels(shape: Shape, batch_size: int = 2) -> Tensor:
    """Return noise as images lie in memory, `(batch_size, H, W, C)` uint8."""
    channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, height, width, channels), generator=generator, dtype=torch.uint8)


def props(path: Path) -> dict[str, str]:
    """Return what an ONNX file says about itself, by name."""
    found: dict[str, str] = open_file(path).get_modelmeta().custom_metadata_map
    return found


_Side = Annotated[int, msgspec.Meta(ge=1, le=65_536)]


@dataclass(frozen=True)
class _Extra:
    """What the run that made a file kept of its data."""

    image_shape: tuple[_Side, _Side, _Side] = (3, 224, 224)
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    result: dict[str, Any] = field(default_factory=dict)


def _extra(path: Path, description: Description) -> _Extra:
    try:
        return msgspec.convert(description.extra, _Extra)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{path} says odd things of its data: {error}; save the model again") from error


def _classes(path: Path, description: Description) -> int:
    """Return the number of outputs that a file's model was built with."""
    built = (description.spec or {}).get("classes")
    return int(built or len(_extra(path, description).classes) or 1000)
