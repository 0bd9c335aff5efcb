"""Everything that can be asked of a run: the options of the command line, checked, and written to `config.toml`.

One frozen dataclass is the single list of options: the command line, the TOML file and the library read it. Defaults
and ranges are those of the components' own configs (`Budget`, `SelectionOptions`, `TrainingConfig`, ...). What is left
open (`None`) is filled in from the other options, so that a `Settings` says in full what will happen.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from compressor import deploy
from compressor.budget import (
    ALIGNED,
    LARGE,
    MOST_ROUNDS,
    USUAL_SCHEDULE,
    Allocation,
    Budget,
    Cubic,
    Limits,
    SelectionOptions,
    Threshold,
)
from compressor.deploy import TOLERANCE, Device, Engine, Place, Precision
from compressor.errors import InputError, RangeError, UnknownNameError
from compressor.job.board import require_tensorboard
from compressor.job.checks import (
    OBSERVING,
    has_schedule,
    has_teacher,
    is_during,
    is_sparse,
    observes,
    require_effects,
    require_names,
)
from compressor.job.device import require_bfloat16, require_compiler, usable_device
from compressor.job.options import (
    NumberOrAuto,
    Origin,
    WholeOrAuto,
    as_typed,
    as_words,
    from_config,
    kinds_of,
    left_open,
    option,
    require_kind,
    sparsities,
    to_toml,
    typed_with,
)
from compressor.relevance import EstimatorName, Exclusion, RelevanceConfig
from compressor.sparse import Granularity, MaskAllocation, SparseConfig
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
_USUAL_ROUNDING = f"{ALIGNED} in groups of {LARGE} channels or more, else 1; by the table with --measure latency"


@dataclass(frozen=True)
class Settings:
    """The options of one run; a wrong one is refused when the object is made.

    Raises:
        UnknownNameError: a criterion, measure, allocation, ... that does not exist.
        RangeError: a number outside its range.
        InputError: options that contradict each other, or would have no effect.
    """

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

    def __post_init__(self) -> None:
        """Check, and work out what was left open."""
        require_names(vars(self))
        try:
            for component in (
                self.budget,
                self.schedule,
                self.goal,
                self.selection,
                self.training,
                self.relevance,
                self.sparse,
                self.limits,
            ):
                component()
        except RangeError as error:
            # Fields of a config may have another name than their option: batch, --target-batch.
            option_of = {at.name: name for name, at in _origins().items()}
            name = option_of.get(error.name, error.name)
            raise RangeError(as_typed(name), error.value, error.allowed) from error
        self._require_ranges()
        require_effects(vars(self), {item.name: item.default for item in dataclasses.fields(self)})
        for name, value in self._worked_out().items():
            object.__setattr__(self, name, value)
        if self.amp:
            require_bfloat16(self.device)
        if self.compile:
            require_compiler(self.device)
        if self.tensorboard:
            require_tensorboard()

    def _require_ranges(self) -> None:
        """Refuse numbers that belong to the run itself."""
        images = self.recalibrate
        trains = self.epochs != 0 or not is_during(vars(self))  # a network that is trained already may only be cut
        allowed = {
            "recalibrate": ("0, 2, 3, 4, ...", images is None or images == 0 or images >= 2),
            "finetune_epochs": ("0, 1, 2, ...", (self.finetune_epochs or 0) >= 0),
            "qat_epochs": ("0 to 100,000", 0 <= self.qat_epochs <= 100_000),
            "epochs": ("1, 2, 3, ...; 0 with --when after", trains),
            "rounds": (f"1 to {MOST_ROUNDS}", 1 <= self.rounds <= MOST_ROUNDS),
            "tolerance": ("[0, 1)", 0 <= (self.tolerance or 0) < 1),
            "checkpoint_every": ("1, 2, 3, ...", self.checkpoint_every is None or self.checkpoint_every >= 1),
            "prune_every": ("1, 2, 3, ...", self.prune_every is None or self.prune_every >= 1),
        }
        for name, (text, holds) in allowed.items():
            if not holds:
                raise RangeError(as_typed(name), getattr(self, name), text)
        if self.compensate is not None and self.compensate not in COMPENSATIONS:
            raise UnknownNameError("compensate", self.compensate, COMPENSATIONS)

    # -- what the components get

    def budget(self) -> Budget:
        """Return what is to go."""
        if self.threshold is not None:
            return Budget(0.0)
        sparsity = Budget.sparsity if self.sparsity is None else self.sparsity
        return Budget(sparsity, self.latency() if self.measure == "latency" else self.measure)

    def schedule(self) -> Cubic:
        """Return when how much of it goes, where it goes in training."""
        return dataclasses.replace(USUAL_SCHEDULE, **self._given_to(Cubic))

    def latency(self) -> deploy.LatencyCost:
        """Return where a latency counts, and how it is predicted."""
        return deploy.LatencyCost(Place(**self._given_to(Place)))

    def goal(self) -> Budget | Threshold:
        """Return what channels go by: a budget, or a threshold."""
        return self.budget() if self.threshold is None else Threshold(self.threshold)

    def selection(self) -> SelectionOptions:
        """Return how channels are chosen."""
        round_to = None if self.round_to == "auto" else self.round_to
        if is_sparse(self.criterion):
            return SelectionOptions(round_to=round_to)
        return SelectionOptions(cast(Allocation, self.allocate or SelectionOptions.allocate), round_to)

    def training(self, epochs: int | None = None) -> TrainingConfig:
        """Return how one stage trains, for so many epochs."""
        # Options have the names of its fields, but for two: epochs are those of the stage, and --warmup is relevance's.
        names = {item.name for item in dataclasses.fields(TrainingConfig)} - {"epochs", "warmup"}
        typed = {name: getattr(self, name, None) for name in names}
        given = {name: value for name, value in typed.items() if value is not None and value != "auto"}
        # A network that is trained already would lose what it knows to the steps of a new one.
        usual_lr = USUAL_LR.get(self.optimizer, TrainingConfig.lr) * (TRAINED_LR if self.weights else 1)
        usual = self._usual_epochs() if self.epochs is None else self.epochs
        return TrainingConfig(**{"epochs": epochs or usual or 1, "lr": usual_lr, **given})

    def _usual_epochs(self) -> int:
        return TRAINED_EPOCHS if self.weights else TrainingConfig.epochs

    def relevance(self) -> RelevanceConfig:
        """Return how relevance observes."""
        return RelevanceConfig(**self._given_to(RelevanceConfig))

    def sparse(self) -> SparseConfig:
        """Return what is masked."""
        allocate = cast(MaskAllocation | None, self.allocate) if is_sparse(self.criterion) else None
        return SparseConfig(**self._given_to(SparseConfig), allocate=allocate)

    def _given_to(self, config: type) -> dict[str, Any]:
        """Return the options of a config that have a value, by the names of its own fields."""
        values = {origin.name: getattr(self, name) for name, origin in _origins().items() if origin.config is config}
        return {name: value for name, value in values.items() if value is not None}

    def limits(self) -> Limits:
        """Return what the options say about single groups."""
        shares: dict[str, float] = {}
        for word in self.sparsity_by_pattern:
            pattern, _, share = word.rpartition("=")
            if shares.setdefault(pattern, float(share)) != float(share):
                raise InputError(
                    f"--sparsity {pattern} came with {shares[pattern]:g} and {share}: leave one of them out"
                )
        return Limits(self.keep, self.only, shares)

    # -- from and to text

    @staticmethod
    def from_options(given: Mapping[str, Any], source: str = "") -> Settings:
        """Make settings from option names as typed (`round-to`) and their values; all others take their defaults.

        Args:
            given: values by option name.
            source: the file they are from, for messages.

        Raises:
            UnknownNameError: an option that does not exist; says which is close.
            InputError: a value of the wrong kind.
        """
        kinds = option_kinds()
        where = f" in {source}" if source else ""
        number, patterns = sparsities(given["sparsity"], where) if "sparsity" in given else ([], [])
        given = {name: value for name, value in given.items() if name != "sparsity"}
        for name, value in [*given.items(), *(("sparsity", each) for each in number)]:
            if name not in kinds:
                raise UnknownNameError(f"option{where}", name, kinds)
            require_kind(name, value, kinds[name], where)
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
        }
        plain |= {"sparsity-by-pattern": tuple(patterns)} | ({"sparsity": number[0]} if number else {})
        return Settings(**{name.replace("-", "_"): value for name, value in plain.items()})

    def given(self) -> dict[str, Any]:
        """Return every option that has a value, by its name as typed; `Settings.from_options` takes it back."""
        values = {name: getattr(self, name.replace("-", "_")) for name in option_kinds()}
        if self.sparsity_by_pattern:
            number = [] if self.sparsity is None else [self.sparsity]
            values["sparsity"] = [*number, *self.sparsity_by_pattern]
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value for name, value in listed.items() if value is not None}

    def toml(self) -> str:
        """Return the text of `config.toml`: one line for each option."""
        return to_toml(self.given())

    def command(self) -> str:
        """Return the shortest line to type that makes these settings."""
        how_much = "sparsity" if self.threshold is None else "threshold"
        named = {name: self.given()[name] for name in ("criterion", "model", "data", how_much)}
        usual = Settings.from_options({**named, "when": self.when}).given()
        named |= {name: value for name, value in self.given().items() if value != usual.get(name)}
        words = [word for name, value in named.items() for word in as_words(name, value)]
        return shlex.join(["compress", *words])

    # -- what was left open

    def _worked_out(self) -> dict[str, Any]:
        """Return what the options that were left open come to."""
        during = is_during(vars(self))
        opened: dict[str, Any] = {
            "when": "during" if during else "after",
            "device": usable_device(self.device),
            "out": self.out or self._folder(),
            "lr": self.lr or self.training().lr,
            "epochs": self._usual_epochs() if self.epochs is None else self.epochs,
        }
        if during and has_schedule(self.criterion):
            opened |= {"first_cut": self.schedule().begin, "last_cut": self.schedule().end}
        if not during:
            opened["finetune_epochs"] = self.finetune_epochs
            if self.finetune_epochs is None:
                opened["finetune_epochs"] = (opened["epochs"] + 1) // 2
        if self.distill is None:
            opened["distill"] = FINETUNE_DISTILL if has_teacher(vars(self)) else 0.0
        if opened.get("distill", self.distill):
            opened["temperature"] = self.training().temperature
        if self.threshold is None:
            opened["sparsity"] = self.budget().sparsity
        if is_sparse(self.criterion):
            sparse = self.sparse()
            opened["granularity"] = sparse.granularity
            opened["allocate"] = sparse.allocation_for(self.criterion)
            return opened
        if self.allocate is None and self.threshold is None:
            by_relevance = self.criterion == OBSERVING and not during
            opened["allocate"] = "relevance" if by_relevance else SelectionOptions.allocate
        if self.compensate is None:
            opened["compensate"] = COMPENSATIONS[0]
        if self.reconstruct is None:
            opened["reconstruct"] = not during and self.compensate in (None, "linear")
        if self.recalibrate is None:
            opened["recalibrate"] = 0 if during else RECALIBRATION_IMAGES
        if self.measure == "latency" or self.round_to == "auto":
            place = self.latency().place
            usable_device(place.device, "target-device")
            opened |= {name: getattr(place, at.name) for name, at in _origins().items() if at.config is Place}
        if observes(vars(self)):
            config = self.relevance()
            of_relevance = {name: at.name for name, at in _origins().items() if at.config is RelevanceConfig}
            opened |= {name: getattr(config, own) for name, own in of_relevance.items()}
        return opened

    def _how_much(self) -> str:
        return f"{self.budget().sparsity:g}" if self.threshold is None else f"below{self.threshold:g}"

    def _folder(self) -> str:
        data = self.data.rstrip("/").rpartition("/")[2]
        parts = (self.model, data, self.criterion, self._how_much(), f"seed{self.seed}")
        return "runs/" + "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part).strip("._") for part in parts)


def option_kinds() -> dict[str, Any]:
    """Return the type of every option, by its name as typed."""
    return kinds_of(Settings)


def _origins() -> dict[str, Origin]:
    """Return, by option, where it has its default, if that is in a config that only some runs need."""
    return {item.name: item.metadata["origin"] for item in dataclasses.fields(Settings) if "origin" in item.metadata}
