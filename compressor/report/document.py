"""The content of a report: what `report.json` holds, written and read back without loss.

Everything that a run has to say is in one frozen `Report`; tables, pictures and the page only show it. The file carries
a version: a reader refuses what a newer compressor wrote instead of guessing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.errors import ArtifactError

FORMAT = "compressor-report"
VERSION = 1


@dataclass(frozen=True)
class Figures:
    """What one model costs and how well it does.

    Attributes:
        accuracy: share of right answers on the test part, in [0, 1].
        loss: mean cross-entropy on the test part.
        images: how many images the test part holds.
        params, macs, channels: our counts; MACs for one example, one multiply-add counts 1.
        fvcore_macs: the same MACs as fvcore counts them.
        size_bytes, onnx_size_bytes: of the safetensors and of the ONNX file.
    """

    accuracy: float
    loss: float
    images: int
    params: int
    macs: int
    channels: int
    fvcore_macs: int
    size_bytes: int
    onnx_size_bytes: int


@dataclass(frozen=True)
class Goal:
    """What was asked of the pruning and what came of it; fractions of the measure that were removed.

    Attributes:
        measure: params, macs or channels; weights where single ones were masked.
        asked, reached: fractions in [0, 1).
        blocked: readable lines: what stood in the way, if anything did.
    """

    measure: str
    asked: float
    reached: float
    blocked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """The channels of one group, before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class FrozenLayer:
    """Channels that could not be cut, and why."""

    tensor: str
    dim: int
    reason: str
    count: int


@dataclass(frozen=True)
class Cut:
    """One cut in the course of a training run.

    Attributes:
        stage: the stage of the run that made it, as in `Epoch.stage`.
        step: training steps done in that stage when it was made.
        channels: how many channels went.
        params: how many parameters are left.
    """

    stage: str
    step: int
    channels: int
    params: int


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch.

    Attributes:
        stage: "train" (before the ways part), "dense" or "pruned".
        epoch, step: done in this stage when the record was taken.
        train_loss, validation_loss: mean cross-entropy.
        validation_accuracy: in [0, 1].
        lr: learning rate of the last step.
        seconds: wall time of the epoch.
        params: parameters of the model at its end.
    """

    stage: str
    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    lr: float
    seconds: float
    params: int


@dataclass(frozen=True)
class Timing:
    """Latency of one model in one place, from `n` timed calls; milliseconds for a whole batch."""

    model: str
    backend: str
    device: str
    batch_size: int
    n: int
    mean_ms: float
    min_ms: float
    p10_ms: float
    p25_ms: float
    p50_ms: float
    p75_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class Parity:
    """How closely an ONNX file gives the outputs of its PyTorch model.

    Attributes:
        file: name of the ONNX file.
        max_abs_difference: over all outputs and inputs compared.
        relative: that difference as a share of the outputs' scale.
        images: how many inputs were compared.
        top1_agreement: share of them with the same answer, in [0, 1].
        providers: where onnxruntime ran it.
    """

    file: str
    max_abs_difference: float
    relative: float
    images: int
    top1_agreement: float
    providers: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """One run, complete: everything that the tables, the pictures and the page show.

    Attributes:
        name: of the run folder.
        created: time of writing, ISO 8601 with the offset from UTC.
        command: what to type to run it again.
        settings: every option of the run, by its name on the command line.
        machine: processor, memory, versions; whatever `compressor.latency.machine` gives.
        dense, pruned: figures of the two models.
        goal: asked and reached.
        layers, frozen: what the channel graph held.
        epochs, cuts: the course of the training, in order.
        timings, parity: of both models.
        files: size in bytes of each file of the run folder, by name.
        notes: what the reader should know besides.
    """

    name: str
    created: str
    command: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    dense: Figures
    pruned: Figures
    goal: Goal
    layers: tuple[Layer, ...]
    frozen: tuple[FrozenLayer, ...]
    epochs: tuple[Epoch, ...]
    cuts: tuple[Cut, ...]
    timings: tuple[Timing, ...]
    parity: tuple[Parity, ...]
    files: dict[str, int]
    notes: tuple[str, ...] = ()


_LISTS: dict[str, type] = {
    "layers": Layer,
    "frozen": FrozenLayer,
    "epochs": Epoch,
    "cuts": Cut,
    "timings": Timing,
    "parity": Parity,
}
_PARTS: dict[str, type] = {"dense": Figures, "pruned": Figures, "goal": Goal}


def to_json(report: Report) -> str:
    """Give the text of `report.json`: one object, `format` and `version` first; NaN and infinities become null."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(report)}
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str, source: str) -> Report:
    """Read back what `to_json` wrote.

    Args:
        text: the content of the file.
        source: its name, for messages.

    Raises:
        ArtifactError: not JSON, not a report, of a newer version, or with a part missing.
    """
    content = _parsed(text, source)
    try:
        parts = {name: _build(kind, content[name]) for name, kind in _PARTS.items()}
        lists = {name: tuple(_build(kind, item) for item in content[name]) for name, kind in _LISTS.items()}
        plain = {key: value for key, value in content.items() if key not in {*parts, *lists, "format", "version"}}
        report: Report = _build(Report, {**plain, **parts, **lists})
        return report
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{source} is damaged: {error}; run the job again, or take the file from a copy") from error


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{source} is no JSON ({error}); give a run folder that compress made") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{source} is no report of compressor; give a run folder that compress made")
    if content.get("version") != VERSION:
        raise ArtifactError(
            f"{source} has version {content.get('version')}, and this compressor reads version {VERSION}; "
            "read it with the version that wrote it"
        )
    return content


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    """Make a dataclass from JSON: lists become tuples, and null becomes NaN where a number belongs."""
    hints = {field.name: field.type for field in dataclasses.fields(kind)}
    restored = {name: _restore(value, str(hints.get(name))) for name, value in values.items()}
    return kind(**restored)


def _restore(value: Any, hint: str) -> Any:
    if value is None and hint == "float":
        return math.nan
    return tuple(value) if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say (NaN, infinities) by null, all the way down."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
