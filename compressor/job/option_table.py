"""The table of all options of a run: kinds, defaults, where they stand in the help, and what it says of them.

Defaults that a component has are its own (`Budget`, `SelectionOptions`, `TrainingConfig`, ...), so that they stand in
one place. What is left open is `None`, with words for the help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compressor.budget import ALIGNED, LARGE, USUAL_SCHEDULE, Budget, Cubic
from compressor.deploy import TOLERANCE, Device, Engine, Place, Precision
from compressor.job.options import NumberOrAuto, WholeOrAuto, from_config, left_open, option, typed_with
from compressor.relevance import EstimatorName, Exclusion, RelevanceConfig
from compressor.sparse import Granularity, SparseConfig
from compressor.surgery import COMPENSATIONS, Compensation
from compressor.training import (
    FINETUNE_DISTILL,
    RECALIBRATION_IMAGES,
    TRAINED_EPOCHS,
    TRAINED_LR,
    USUAL_LR,
    TrainingConfig,
)

PUBLISHED = "default"  # as --weights: those that torchvision or timm has for the model
RunMeasure = Literal["params", "macs", "channels", "latency"]
_USUAL_ROUNDING = (
    f"{ALIGNED} in groups of {LARGE} channels or more, else 1; 1 with --threshold; by the table with --measure latency"
)


@dataclass(frozen=True)
class OptionTable:
    """The options of one run as typed, unchecked; None where they were left open."""

    criterion: str = option("relevance", "What", "relevance (observes training), magnitude, set, rigl, l1, l2, ...")
    model: str = option("resnet18", "What", "A torchvision classifier, timm:NAME, or package.module:factory.")
    stem: str = option("imagenet", "What", "imagenet, or cifar for small images.")
    weights: str = option(
        "",
        "What",
        "Begin with a file of weights (.safetensors, .pt, .pth), or with 'default', those published with the model.",
        "random",
    )
    data: str = option("digits", "What", "digits, cifar10, cifar100, or imagefolder:PATH.")
    cache: str = option("", "What", "Folder that keeps decoded images of an imagefolder, for the next runs.", "none")
    download: bool = option(False, "What", "Download the data set if it is not there.")

    sparsity: float | None = option(
        None,
        "How much",
        "Fraction to remove, in [0, 1); PATTERN=0.3 beside it: of the channels of these groups.",
        f"{Budget.sparsity}; none with --threshold",
    )
    sparsity_by_pattern: tuple[str, ...] = typed_with("sparsity")
    threshold: float | None = option(
        None,
        "How much",
        "Instead of --sparsity: what scores below goes (an L1 norm, a distance, ...; not above, of confidences).",
        "none",
    )
    measure: RunMeasure = option(Budget.measure, "How much", "Of what: params, macs, channels or latency.")
    allocate: str | None = option(
        None,
        "How much",
        "Of each group: alike (uniform), as all channels rank together (global), by relevance per cost (relevance); of "
        "a masked layer: erk, uniform, or global (magnitude).",
        "relevance with --criterion relevance --when after, erk for set and rigl, else uniform",
    )
    round_to: WholeOrAuto | None = option(
        None,
        "How much",
        "Round channel counts to multiples of this; auto: what pays where the network is to run, measured.",
        _USUAL_ROUNDING,
    )
    keep: tuple[str, ...] = option((), "How much", "Groups that stay whole, by PATTERN; may be repeated.", "none")
    only: tuple[str, ...] = option((), "How much", "The groups that may lose channels; may be repeated.", "all")

    compensate: Compensation | None = option(
        None,
        "Cuts",
        "Into what stays goes what predicts a removed channel (linear), its mean, or none.",
        COMPENSATIONS[0],
    )
    reconstruct: bool | None = option(
        None,
        "Cuts",
        "After the last cut, fit every layer to what it returned in the whole model.",
        "with --when after and --compensate linear",
    )
    rounds: int = option(1, "Cuts", "Cut in so many steps, with all statistics anew before each, with --when after.")
    recalibrate: int | None = option(
        None,
        "Cuts",
        "Images for BatchNorm statistics anew after a cut; 0: none.",
        f"{RECALIBRATION_IMAGES} with --when after, else 0",
    )
    target_engine: Engine | None = left_open(
        Place, "engine", "Latency", "What the network will run in: onnxruntime, openvino or torch."
    )
    target_device: Device | None = left_open(Place, "device", "Latency", "cpu; or cuda, with torch.")
    target_batch: int | None = left_open(Place, "batch", "Latency", "Images at once.")
    target_threads: int | None = left_open(Place, "threads", "Latency", "CPU threads of one operator.")

    verify: bool = option(True, "Cuts", "Compare every cut with the masked model on real images.")

    when: str | None = option(
        None, "Training", "Prune during or after training.", "during for relevance, magnitude, set, rigl; else after"
    )
    epochs: int | None = option(
        None,
        "Training",
        "Epochs of training; 0 only cuts, with --when after.",
        f"{TrainingConfig.epochs}, {TRAINED_EPOCHS} with --weights",
    )
    finetune_epochs: int | None = option(
        None, "Training", "Epochs after the cut, with --when after.", "half of --epochs"
    )
    batch_size: int = from_config(TrainingConfig, "batch_size", "Training", "Images in one training step.")
    accumulate: int = from_config(
        TrainingConfig, "accumulate", "Training", "Parts of a step's images that run one after the other."
    )
    lr: NumberOrAuto | None = option(
        None,
        "Training",
        "Highest learning rate; auto: what a trial of a hundred steps finds.",
        ", ".join(f"{lr:g} with {name}" for name, lr in USUAL_LR.items()) + f", times {TRAINED_LR} with --weights",
    )
    optimizer: str = from_config(TrainingConfig, "optimizer", "Training", "sgd or adamw.")
    weight_decay: float = from_config(TrainingConfig, "weight_decay", "Training", "Of all parameters.")
    decay_norms: bool = from_config(
        TrainingConfig, "decay_norms", "Training", "Whether norms and biases decay as well."
    )
    clip_norm: float | None = from_config(
        TrainingConfig, "clip_norm", "Training", "Largest norm of all gradients together.", "none"
    )
    label_smoothing: float = from_config(
        TrainingConfig, "label_smoothing", "Training", "Share of the target that all classes get, in [0, 1)."
    )
    crop: float = from_config(
        TrainingConfig,
        "crop",
        "Training",
        "Smallest share of the area of a random resized crop; 0: moves images instead.",
    )
    jitter: float = from_config(
        TrainingConfig, "jitter", "Training", "Largest change of brightness, contrast and saturation, in [0, 1]."
    )
    mixup: float = from_config(TrainingConfig, "mixup", "Training", "Alpha of Mixup; 0: none.")
    cutmix: float = from_config(TrainingConfig, "cutmix", "Training", "Alpha of CutMix; 0: none.")
    distill: float | None = left_open(
        TrainingConfig,
        "distill",
        "Training",
        "Share of the pruned model's loss that is a teacher's soft targets, in [0, 1].",
        f"{FINETUNE_DISTILL:g} after training, else 0",
    )
    ema: float = from_config(
        TrainingConfig, "ema", "Training", "Decay of a moving average of the weights that is kept in the end; 0: none."
    )
    balanced: bool = from_config(
        TrainingConfig, "balanced", "Training", "Draw training images so that every class comes equally often."
    )
    amp: bool = from_config(
        TrainingConfig, "amp", "Training", "Train in bfloat16, where the GPU or the processor multiplies in it."
    )
    channels_last: bool = from_config(
        TrainingConfig, "channels_last", "Training", "Keep images in channels-last order, which GPUs prefer."
    )
    sync_batchnorm: bool = from_config(
        TrainingConfig, "sync_batchnorm", "Training", "With torchrun: BatchNorm over the images of all processes."
    )
    compile: bool = from_config(TrainingConfig, "compile", "Training", "Run training steps through torch.compile.")
    temperature: float | None = left_open(TrainingConfig, "temperature", "Training", "Of the soft targets.")
    teacher: str = option("", "Training", "A .safetensors file of compress with the teacher.", "the dense model")
    checkpoint_every: int | None = option(
        None, "Training", "Training steps between checkpoints.", "one after every epoch"
    )
    prune_every: int | None = option(
        None,
        "Training",
        "Training steps between two cuts, or two changes of masks.",
        "a twentieth of the training; 100 for rigl, an epoch for set",
    )

    first_cut: float | None = left_open(
        Cubic, "begin", "Training", "Share of the training before the first cut, in [0, 1).", f"{USUAL_SCHEDULE.begin}"
    )
    last_cut: float | None = left_open(
        Cubic, "end", "Training", "Share of the training after which all is cut.", f"{USUAL_SCHEDULE.end}"
    )

    granularity: Granularity | None = left_open(
        SparseConfig, "granularity", "Masks", "What magnitude, set and rigl mask: weight or channel."
    )

    relevance_estimator: EstimatorName | None = left_open(
        RelevanceConfig, "estimator", "Relevance", "gate, soft, mixed, loss or source."
    )
    exclude: Exclusion | None = left_open(
        RelevanceConfig,
        "exclude",
        "Relevance",
        "What an excluded channel becomes while observing: zero, its mean, or what the others predict (linear).",
        "mean for loss, else zero",
    )
    drop: float | None = left_open(
        RelevanceConfig, "drop", "Relevance", "Share of channels drawn in each sample, in (0, 0.5]."
    )
    observe_every: int | None = left_open(
        RelevanceConfig,
        "observe_every",
        "Relevance",
        "Training steps of which one draws channels.",
        "8, or less where --prune-every is short; 1 for loss and source",
    )
    confidence: float | None = left_open(
        RelevanceConfig,
        "confidence",
        "Relevance",
        "Channels more relevant than a dummy with a probability above this are cut last, in (0, 1].",
    )
    dummies: int | None = left_open(
        RelevanceConfig, "dummies", "Relevance", "Channels of no effect to compare with, 10 or more."
    )
    warmup: int | None = left_open(
        RelevanceConfig,
        "warmup",
        "Relevance",
        "Steps over which --drop rises from 0.",
        "a twentieth of the training, 0 for source",
    )

    precision: Precision = option("fp32", "Run", "Of ONNX files beside those in float32: fp16, int8.")
    tolerance: float | None = option(None, "Run", "Accuracy that int8 may lose, in [0, 1).", f"{TOLERANCE}")

    qat_epochs: int = option(0, "Run", "Epochs of quantisation-aware training, where int8 loses more than --tolerance.")

    tensorboard: bool = option(False, "Run", "Also write what is measured while training for TensorBoard.")
    metric: str = option(
        "", "Run", "A figure of your own: package.module:function, called with a model; add :lower if less is better."
    )
    seed: int = from_config(TrainingConfig, "seed", "Run", "Seed of everything that draws.")
    device: str = option("auto", "Run", "cpu, cuda, cuda:1, ..., or auto: a GPU if there is one.")
    out: str = option("", "Run", "The run folder.", "runs/MODEL-DATA-CRITERION-SPARSITY-SEED")
