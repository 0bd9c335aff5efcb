"""The content of a report: everything that a run has to say, in one frozen `Report`.

Tables, pictures and the page only show it; `compressor.report.serialization` writes it to `report.json` and reads it
back. The types are part of the format: what is read is held against the annotations below, field by field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compressor._utils import percentile


@dataclass(frozen=True)
class Figures:
    """What one model costs and how well it does.

    Attributes:
        accuracy: share of right answers on the test split, in [0, 1].
        loss: mean cross-entropy on the test split.
        images: how many images the test split holds.
        params, macs, channels: our counts; MACs for one example, one multiply-add counts 1.
        fvcore_macs: the same MACs as fvcore counts them.
        size_bytes, onnx_size_bytes: of the safetensors and of the ONNX file; None where it could not be exported.
    """

    accuracy: float
    loss: float
    images: int
    params: int
    macs: int
    channels: int
    fvcore_macs: int | None
    size_bytes: int
    onnx_size_bytes: int | None


@dataclass(frozen=True)
class ClassAccuracy:
    """How well both models know one class: shares of its test images answered rightly, in [0, 1]."""

    name: str
    images: int
    dense: float
    pruned: float

    @property
    def points(self) -> float:
        """What the pruning changed, in percentage points."""
        return 100 * (self.pruned - self.dense)


@dataclass(frozen=True)
class OwnMetric:
    """A figure of the user's own for both models."""

    name: str
    dense: float
    pruned: float
    higher_is_better: bool


@dataclass(frozen=True)
class Goal:
    """What was asked of the pruning and what came of it; fractions of the measure that were removed.

    Attributes:
        measure: params, macs or channels; weights where single ones were masked.
        asked, reached: fractions in [0, 1).
        blocked: readable lines: what stood in the way, if anything did.
        threshold: what channels went by, NaN where it was by a budget.
        met: whether as much went as was asked.
        predicted: of a measured latency, what the table of layers had said; else NaN.
    """

    measure: str
    asked: float
    reached: float
    blocked: tuple[str, ...] = ()
    threshold: float = math.nan
    met: bool = True
    predicted: float = math.nan

    @property
    def wanted(self) -> str:
        """What was asked, and predicted, in words."""
        if not math.isnan(self.threshold):
            return f"all below {self.threshold:g}"
        return f"{self.asked:.1%} asked" + ("" if math.isnan(self.predicted) else f", {self.predicted:.1%} predicted")


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
class GroupRelevance:
    """What relevance showed of a group before the last cut.

    Attributes:
        name: of the group.
        deviations: of every channel there was, its relevance less the mean of its dummies, in their standard
            deviations; NaN where they have none.
        is_above: of every channel, whether it was more relevant than a dummy with the confidence that was asked for.
        undecided: channels that could not be told from chance, on either side.
        reliability: rank correlation between two halves of the steps.
    """

    name: str
    deviations: tuple[float, ...]
    is_above: tuple[bool, ...]
    undecided: int
    reliability: float


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
    """Latency of one model in one place: every timed call in its order, milliseconds for a whole batch.

    `model` is "dense" or "pruned", or "control": the dense model once more, whose difference from itself is noise.
    """

    model: str
    backend: str
    device: str
    batch_size: int
    samples_ms: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of timed calls."""
        return len(self.samples_ms)

    @property
    def p50_ms(self) -> float:
        """Median."""
        return self.percentile_ms(50)

    def percentile_ms(self, q: float) -> float:
        """Return a percentile, `q` in [0, 100]."""
        return percentile(self.samples_ms, q)


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
class Lowered:
    """An ONNX file in a lower precision, and what that cost.

    Attributes:
        file: its name.
        precision: "fp16" or "int8".
        accuracy: share of right answers on the test split, in [0, 1].
        size_bytes: of the file.
        top1_agreement: share of validation images with the class of the float32 file.
        left_whole: layers that stayed in float32.
        missed: what the gate refused it for, empty where it passed.
        qat_epochs: for how long the model was trained on, with weights and inputs rounded, to be quantised.
    """

    file: str
    precision: str
    accuracy: float
    size_bytes: int
    top1_agreement: float
    left_whole: tuple[str, ...] = ()
    missed: str = ""
    qat_epochs: int = 0


@dataclass(frozen=True)
class PeakMemory:
    """By how much a process grows that loads an ONNX file into onnxruntime and runs so many images at once."""

    batch_size: int
    dense_bytes: int
    pruned_bytes: int


@dataclass(frozen=True)
class LayerTime:
    """One layer of both models in onnxruntime, one image at once.

    Attributes:
        name: of the layer; empty for everything that belongs to none.
        dense_ms, pruned_ms: medians, as onnxruntime's profile has them.
        dense, pruned: shapes of its weight, `(D, C / groups, ...)` of convolutions; empty without a layer.
    """

    name: str
    dense_ms: float
    pruned_ms: float
    dense: tuple[int, ...] = ()
    pruned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """One run, complete: everything that the tables, the pictures and the page show.

    Attributes:
        name: of the run folder.
        created: time of writing, ISO 8601 with the offset from UTC.
        command: what to type to run it again.
        settings: every option of the run, by its name on the command line.
        machine: processor, memory, versions; whatever `compressor.deploy.describe_machine` returns.
        dense, pruned: figures of the two models.
        goal: asked and reached.
        layers, frozen: what the channel graph held.
        epochs, cuts: the course of the training, in order.
        timings, parity: of both models.
        files: size in bytes of each file of the run folder, by name.
        notes: what the reader should know besides.
        lowered: both models in a lower precision, where that was asked for.
        classes: the accuracy of each, of those that have test images.
        metrics: the user's own figures.
        relevance: of every group, where relevance chose during training.
        layer_times: where the time goes in onnxruntime, on a CPU.
        memory: what onnxruntime takes, on a CPU.
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
    lowered: tuple[Lowered, ...] = ()
    classes: tuple[ClassAccuracy, ...] = ()
    metrics: tuple[OwnMetric, ...] = ()
    relevance: tuple[GroupRelevance, ...] = ()
    layer_times: tuple[LayerTime, ...] = ()
    memory: tuple[PeakMemory, ...] = ()
