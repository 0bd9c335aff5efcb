"""Lower precisions of an ONNX file: float16, and int8 by calibration, each behind a gate of its own.

    made = lower_precision("model.onnx", "model.int8.onnx", "int8", calibration=images, check=[(images, labels), ...])
    made.accuracy, made.whole_accuracy

int8 is onnxruntime's static quantisation: weights per channel, every activation by the range that it had over the
calibration images, in QDQ form, which ONNX Runtime, OpenVINO and TensorRT read.

Shape letters: B images at once, C classes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from compressor._utils import atomic_write
from compressor.deploy.layer_profile import onnx_layers
from compressor.deploy.place import PRECISIONS, TARGETS, TOLERANCE, Precision, Target
from compressor.deploy.session import open_file
from compressor.errors import ArtifactError, InputError, ParityError, RangeError, UnknownNameError

LEAST_COSINE = 0.9999  # between the outputs of float16 and those of float32
LEAST_AGREEMENT = 0.99  # of their top-1 classes
_RANKED_IMAGES = 64  # on which layers are tried one at a time

Array = np.ndarray[Any, Any]
Labelled = tuple[Array, Array | None]  # `(B, ...)` as the file takes them, and `(B,)` class indices


@dataclass(frozen=True)
class PrecisionReport:
    """An ONNX file in a lower precision that passed its gate.

    Attributes:
        path, size_bytes: the file.
        precision: what was asked for.
        images: how many were compared.
        cosine: smallest cosine between an image's outputs and those of the float32 file.
        top1_agreement: share of images with the same top-1 class, the largest value of the first output.
        whole_accuracy, accuracy: of the float32 file and of this one, in [0, 1]; NaN without labels.
        left_whole: layers that stay in float32, because int8 costs too much there.
    """

    path: Path
    size_bytes: int
    precision: Precision
    images: int
    cosine: float
    top1_agreement: float
    whole_accuracy: float
    accuracy: float
    left_whole: tuple[str, ...] = ()


def lower_precision(
    source: str | Path,
    path: str | Path,
    precision: Precision,
    *,
    check: Iterable[Labelled],
    calibration: Iterable[Array] = (),
    tolerance: float = TOLERANCE,
    target: Target | None = None,
    reference: str | Path | None = None,
    leave_whole: bool = True,
) -> PrecisionReport:
    """Write a float32 ONNX file in a lower precision, and hold it against the original.

    float16 passes with a cosine above 0.9999 for every image and the same top-1 class for 99 of 100. int8 passes if
    its accuracy is within `tolerance`; if not, the layers that hurt most are left in float32, 1, 2, 4, ... of them up
    to half. Inputs and outputs stay what they were.

    Args:
        source: the file in float32, with one input.
        path: where the other goes.
        precision: "fp16" or "int8".
        check: images to compare on, and for int8 their classes; not those that it is calibrated on.
        calibration: images for int8; 100 to 500 are usual.
        tolerance: how much accuracy int8 may lose, a share of the images.
        target: what int8 is to run on; by default a processor like this one.
        reference: the float32 file that the gate compares with, where `source` was trained on from it for int8;
            by default `source`.
        leave_whole: whether layers may be left in float32.

    Raises:
        InputError: no images where there must be some, or a file that is in a lower precision already.
        RangeError, UnknownNameError: a tolerance or a name that is not allowed.
        ArtifactError: `source` cannot be read, or has several inputs.
        ParityError: the gate is missed. The file is kept beside as `NAME.failed.onnx`.
    """
    source, path = Path(source), Path(path)
    if precision not in PRECISIONS[1:]:
        raise UnknownNameError("precision", precision, PRECISIONS[1:])
    if target is not None and target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    if not 0 <= tolerance < 1:
        raise RangeError("tolerance", tolerance, "[0, 1)")
    if reference is None:
        _require_single(source)
    checked = list(check)
    judge = _Judge(precision, tolerance, Path(reference or source), checked)
    with atomic_write(path) as unproven, TemporaryDirectory() as folder:
        if precision == "fp16":
            _halve(source, unproven)
            found = judge(unproven)
        else:
            images = list(calibration)
            if not images or any(labels is None for _, labels in checked):
                raise InputError("int8 needs calibration images, and labelled images to check on: pass both")
            quantised = _Quantisation(source, images, target or _this_machine(), Path(folder))
            found = _least_left_whole(quantised, judge, unproven, leave_whole)
        if found.refusal:
            kept = path.with_name(f"{path.stem}.failed.onnx")
            unproven.replace(kept)
            raise ParityError(found.refusal, str(kept), "Give --tolerance, or calibrate on other images")
        _say(unproven, Path(reference or source), {"precision": precision, **found.said()})
    return PrecisionReport(
        path,
        path.stat().st_size,
        precision,
        judge.images,
        found.cosine,
        found.agreement,
        judge.accuracy,
        found.accuracy,
        found.left_whole,
    )


def weight_bits(target: Target | None = None) -> int:
    """Return how many bits a weight of int8 has on a target; by default on a processor like this one."""
    # Without VNNI two products of 8 bits are summed in 16: seven bits of weight keep them from overflowing.
    return 7 if (target or _this_machine()) == "x86" else 8


# -- the gate


@dataclass(frozen=True)
class _Judgement:
    """How near a file comes to the original, and what is wrong with that, if anything is."""

    cosine: float
    agreement: float
    accuracy: float
    refusal: str = ""
    left_whole: tuple[str, ...] = ()

    def said(self) -> dict[str, Any]:
        """Return what the file says of itself, JSON values by name."""
        said = {"validation_accuracy": None if math.isnan(self.accuracy) else self.accuracy, "float32": self.left_whole}
        return {name: value for name, value in said.items() if value}


class _Judge:
    """Holds files against the original, whose outputs are computed once.

    Attributes:
        images: how many.
        accuracy: of the original; NaN without labels.
    """

    def __init__(self, precision: Precision, tolerance: float, source: Path, check: Sequence[Labelled]) -> None:
        if not check:
            raise InputError("check holds no images: pass [(images, labels), ...]")
        self._precision, self._tolerance, self._check = precision, tolerance, check
        self._expected = self._outputs_of(source)
        labels = [labels for _, labels in check if labels is not None]
        self._labels = np.concatenate(labels) if len(labels) == len(check) else None
        self.images = sum(len(images) for images, _ in check)
        self.accuracy = self._accuracy(self._expected)

    def _outputs_of(self, path: Path) -> Array:
        return _outputs(path, [images for images, _ in self._check])

    def some(self, least: int) -> list[Array]:
        """Return the first batches, together at least so many images if there are as many."""
        before = np.cumsum([0, *(len(images) for images, _ in self._check)])
        return [images for (images, _), done in zip(self._check, before, strict=False) if done < least]

    def __call__(self, path: Path) -> _Judgement:
        """Judge a file."""
        got = self._outputs_of(path)
        cosine = float(_cosines(self._expected, got).min())
        agreement = float((self._expected.argmax(1) == got.argmax(1)).mean())
        accuracy = self._accuracy(got)
        return _Judgement(cosine, agreement, accuracy, self._refusal(cosine, agreement, accuracy))

    def _accuracy(self, outputs: Array) -> float:
        return math.nan if self._labels is None else float((outputs.argmax(1) == self._labels).mean())

    def _refusal(self, cosine: float, agreement: float, accuracy: float) -> str:
        if self._precision == "int8":
            lost = self.accuracy - accuracy
            within = lost <= self._tolerance + 1e-12
            return "" if within else (
                f"in int8 {accuracy:.2%} of {self.images} images are right, and {self.accuracy:.2%} in float32: "
                f"{100 * self._tolerance:g} points may be lost"
            )  # fmt: skip
        if not cosine > LEAST_COSINE:  # so that NaN is refused as well
            return f"in float16 an image's outputs have a cosine of {cosine:.6f} with those in float32"
        if agreement < LEAST_AGREEMENT:
            return f"in float16 {agreement:.2%} of {self.images} images have the top-1 class that they have in float32"
        return ""


def _outputs(path: Path, batches: Iterable[Array]) -> Array:
    """Return the first output of a file for all images, `(B, C)` float64."""
    session = _opened(path)
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: images})[0].astype(np.float64) for images in batches]
    return np.concatenate([each.reshape(len(each), -1) for each in found])


def _cosines(ours: Array, theirs: Array) -> Array:
    """Return the cosine of every row with its other, `(B,)`; 1 where both are 0."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    with np.errstate(invalid="ignore"):
        cosines: Array = np.where(lengths == 0, (ours == theirs).all(1), (ours * theirs).sum(1) / lengths)
    return cosines


# -- float16


def _halve(source: Path, path: Path) -> None:
    """Write a file with its weights and inner values in float16, its inputs and outputs as they were."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)


# -- int8


class _Quantisation:
    """Quantises one file in several ways; the calibration images are run once."""

    def __init__(self, source: Path, calibration: Sequence[Array], target: Target, folder: Path) -> None:
        from onnxruntime.quantization import preprocess, registry

        self.source, self.folder = folder / "prepared.onnx", folder
        # BatchNorm that other exporters leave beside its convolution is folded into it.
        preprocess.quant_pre_process(str(source), str(self.source), skip_symbolic_shape=True)
        self._calibration, self._target = calibration, target
        self._input = _opened(source).get_inputs()[0].name
        # Probabilities are the answer, and eight bits of them are few: 1/256 steps.
        self._kinds = sorted(registry.QDQRegistry.keys() - {"Softmax"})

    def write(self, path: Path, *, only: Sequence[str] = (), without: Sequence[str] = ()) -> None:
        """Write the file with all nodes quantised, or these only, or all but these."""
        from onnxruntime import quantization

        signed = self._target in ("arm", "tensorrt")
        with contextlib.redirect_stdout(io.StringIO()):
            quantization.quantize_static(
                str(self.source),
                str(path),
                _reader(self._input, self._calibration),
                op_types_to_quantize=self._kinds,
                per_channel=True,
                reduce_range=weight_bits(self._target) == 7,
                activation_type=quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_quantize=list(only) or None,
                nodes_to_exclude=list(without) or None,
                extra_options={"ActivationSymmetric": self._target == "tensorrt"},
                calibration_cache_path=str(self.folder / "ranges.json"),
            )


def _reader(name: str, images: Sequence[Array]) -> Any:
    """Return calibration images as onnxruntime reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> Mapping[str, Array] | None:
            batch = next(self._left, None)
            return None if batch is None else {name: batch}

    return Reader()


def _least_left_whole(quantised: _Quantisation, judge: _Judge, path: Path, leave_whole: bool) -> _Judgement:
    """Quantise all; where that misses the gate and layers may be left out, all but those that hurt most. Writes `path`.

    A worked example: of 20 layers those whose own quantisation moves the output most are `fc` and `conv1`. Without `fc`
    the gate is still missed, without both it is passed: these two stay in float32.
    """
    quantised.write(path)
    found = judge(path)
    if not found.refusal or not leave_whole:
        return found
    names = {layer.node: layer.name for layer in onnx_layers(quantised.source)}
    worst = _worst_first(quantised, judge, list(names))
    for count in (1 << power for power in range(len(worst).bit_length())):
        if count > len(worst) / 2:
            break
        quantised.write(path, without=worst[:count])
        found = judge(path)
        if not found.refusal:
            return _Judgement(
                found.cosine, found.agreement, found.accuracy, left_whole=tuple(names[name] for name in worst[:count])
            )
    return found


def _worst_first(quantised: _Quantisation, judge: _Judge, layers: Sequence[str]) -> list[str]:
    """Return layers by how far the outputs move when they alone are quantised, the farthest first."""
    images = judge.some(_RANKED_IMAGES)
    expected = _outputs(quantised.source, images)
    moved = {}
    for layer in layers:
        alone = quantised.folder / "alone.onnx"
        quantised.write(alone, only=[layer])
        moved[layer] = float(np.square(_outputs(alone, images) - expected).mean())
    return sorted(layers, key=lambda layer: -moved[layer])


def _this_machine() -> Target:
    """Return what int8 files for processors like this one are made for."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm"
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:  # elsewhere than on Linux: what runs right on all
        return "x86"
    return "x86-vnni" if "avx512_vnni" in known or "avx_vnni" in known else "x86"


# -- files


def _require_single(path: Path) -> None:
    """Refuse a file that is quantised or halved already."""
    import onnx

    open_file(path)  # says what is wrong with it, if it cannot be read
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {each.data_type for each in graph.initializer}
    lower = "int8" if any("Quantize" in each.op_type or "QLinear" in each.op_type for each in graph.node) else ""
    lower = lower or ("fp16" if onnx.TensorProto.FLOAT16 in kinds else "")
    if lower:
        raise InputError(f"{path} is in {lower} already: give the file in float32 that it was made of")


def _opened(path: Path) -> Any:
    session = open_file(path)
    if (count := len(session.get_inputs())) != 1:
        raise ArtifactError(f"{path} has {count} inputs, and only files with one are brought to a lower precision")
    return session


def _say(path: Path, source: Path, more: Mapping[str, Any]) -> None:
    """Let a file say of itself what its original says, and more."""
    import onnx

    model = onnx.load(path)
    known = {each.key: each.value for each in onnx.load(source).metadata_props}
    said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in more.items()}
    onnx.helper.set_model_props(model, known | said)
    onnx.save(model, path)
