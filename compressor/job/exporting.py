"""`compress export`: a saved model as ONNX, and an ONNX file in a lower precision, each behind its gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from compressor.deploy import (
    ExportReport,
    ImageModel,
    Precision,
    PrecisionReport,
    Target,
    WithPreprocessing,
    export_onnx,
    lower_precision,
    open_session,
)
from compressor.errors import InputError
from compressor.job.folder import MODELS
from compressor.job.saved import about, example, loaded, pixels, props, trained_on
from compressor.training import Data, Split, load_data

_CALIBRATION_IMAGES = 256
_CHECK_IMAGES = 5000  # at most: a tenth of a point is then 5 images
_BATCH = 64

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ExportOptions:
    """How a file is to be written.

    Attributes:
        factory, image_size: as for `loaded`.
        preprocess: take pixels and give probabilities.
        precision: of the file.
        data: where images come from, for a lower precision; by default what the model was trained on.
        tolerance: accuracy that int8 may lose, in [0, 1).
        target: what int8 is to run on.
    """

    factory: str = ""
    image_size: int | None = None
    preprocess: bool = False
    precision: Precision = "fp32"
    data: str = ""
    tolerance: float | None = None
    target: Target | None = None


def export(file: Path, out: Path | None, options: ExportOptions) -> ExportReport | PrecisionReport:
    """Write a model in a file as ONNX.

    Args:
        file: a run folder, a .safetensors file of compressor, or, for a lower precision, an .onnx file.
        out: by default beside `file`.
        options: how.

    Raises:
        InputError: options that have no effect, or lack something.
        ArtifactError, ExportError, ParityError: as for `loaded`, `export_onnx` and `lower_precision`.
    """
    file = file / MODELS[0] if file.is_dir() else file
    ending = ".onnx" if options.precision == "fp32" else f".{options.precision}.onnx"
    target = out or file.with_suffix(ending)
    if target.suffix != ".onnx":
        raise InputError(f"--out {target} is not the name of an ONNX file: give one that ends in .onnx")
    _require_effects(file, options)
    if options.precision == "fp32":
        return _in_float32(file, target, options)
    if file.suffix == ".onnx":
        return _lowered(file, target, options, trained_on(file))
    with TemporaryDirectory() as folder:
        whole = _in_float32(file, Path(folder) / "whole.onnx", options)
        return _lowered(whole.path, target, options, trained_on(file))


def _require_effects(file: Path, options: ExportOptions) -> None:
    only_lower = {
        "data": bool(options.data),
        "tolerance": options.tolerance is not None,
        "target": bool(options.target),
    }
    given = [name for name, is_given in only_lower.items() if is_given]
    if options.precision == "fp32" and given:
        raise InputError(f"--{given[0]} has no effect with --precision fp32: leave one of them out")
    for name in ("target", "tolerance"):
        if options.precision == "fp16" and only_lower[name]:
            raise InputError(f"--{name} has no effect with --precision fp16: leave one of them out")
    if file.suffix == ".onnx" and options.precision == "fp32":
        raise InputError(f"{file} is an ONNX file already: give --precision fp16 or int8, or a .safetensors file")
    if file.suffix == ".onnx" and (options.preprocess or options.factory or options.image_size):
        raise InputError("--preprocess, --factory and --image-size are for .safetensors files: leave them out")


def _in_float32(file: Path, target: Path, options: ExportOptions) -> ExportReport:
    model, shape = loaded(file, options.factory, options.image_size)
    says, result = about(file, options.image_size, takes_pixels=options.preprocess)
    inputs = example(model, shape)
    if options.preprocess:
        model, inputs = WithPreprocessing(model, says.mean, says.std), pixels(shape)
    if not says.classes:  # a model that no run made may take and return anything
        return export_onnx(model, target, inputs)
    return export_onnx(
        model,
        target,
        inputs,
        input_names=says.input_names,
        output_names=says.output_names,
        metadata=says.props(result),
    )


# -- lower precisions


def _lowered(source: Path, target: Path, options: ExportOptions, learnt_on: tuple[str, int]) -> PrecisionReport:
    data, seed = options.data or learnt_on[0], learnt_on[1]
    if not data:
        raise InputError(
            f"--precision {options.precision} is checked on images: give --data NAME, imagefolder:PATH say"
        )
    says = _image_model(source)
    found = load_data(data, seed=seed, image_size=says.image_shape[1:] if says else None)
    says = says or ImageModel(found.image_shape, mean=found.train.mean, std=found.train.std)
    return lower_on(source, target, options.precision, found, says, options.tolerance, options.target)


def lower_on(
    source: Path,
    target: Path,
    precision: Precision,
    data: Data,
    says: ImageModel,
    tolerance: float | None = None,
    machine: Target | None = None,
    reference: Path | None = None,
    leave_whole: bool = True,
) -> PrecisionReport:
    """Bring an ONNX file to a lower precision: calibrated on the training part, checked on the validation part.

    Args:
        source, target, precision: as for `lower_precision`.
        data: images that were normalised for training as `says` has it, or will be now.
        says: what the file takes.
        tolerance, machine, reference, leave_whole: as for `lower_precision`; None leaves its default.
    """
    given = {} if tolerance is None else {"tolerance": tolerance}
    calibration = (images for images, _ in _arrays(data.train, says, _CALIBRATION_IMAGES, shuffled=True))
    check = _arrays(data.validation, says, _CHECK_IMAGES)
    return lower_precision(
        source,
        target,
        precision,
        check=check,
        calibration=calibration,
        target=machine,
        reference=reference,
        leave_whole=leave_whole,
        **given,
    )


def accuracy_of(path: Path, part: Split, says: ImageModel) -> float:
    """Return the share of a part's images that an ONNX file gets right."""
    session = open_session(path)
    name = session.get_inputs()[0].name
    found = [
        (session.run(None, {name: images})[0].argmax(1) == labels) for images, labels in _arrays(part, says, len(part))
    ]
    return float(np.concatenate(found).mean())


def _arrays(part: Split, says: ImageModel, images: int, *, shuffled: bool = False) -> Iterator[tuple[Array, Array]]:
    """Return batches of images as the file takes them, with their classes."""
    import torch

    as_read = replace(part, mean=says.mean, std=says.std)
    if says.takes_pixels:
        none, one = (0.0,) * says.image_shape[0], (1.0,) * says.image_shape[0]
        as_read = replace(part, mean=none, std=one)
    # In an order of their own: folders list one class behind the other.
    order = torch.Generator().manual_seed(0) if shuffled or len(part) > images else None
    for batch, labels in islice(as_read.batches(_BATCH, shuffle=order), -(-images // _BATCH)):
        ready = batch.permute(0, 2, 3, 1).to(torch.uint8) if says.takes_pixels else batch
        yield ready.contiguous().numpy(), labels.numpy()


def _image_model(path: Path) -> ImageModel | None:
    """Return what an ONNX file says that it takes; None for a file of somebody else."""
    said = props(path)
    return ImageModel.from_props(said, str(path)) if "image_shape" in said else None
