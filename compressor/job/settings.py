"""Everything that can be asked of a run: the options of the command line, checked, and written to `config.toml`.

There is one list of options (`option_table.py`), which the command line, the TOML file and the library read. Ranges are
those of the components' own configs. What is left open (`None`) is filled in from the other options, so that a
`Settings` says in full what will happen.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from compressor import deploy
from compressor.budget import (
    MOST_ROUNDS,
    USUAL_SCHEDULE,
    Allocation,
    Budget,
    Cubic,
    Limits,
    SelectionOptions,
    Threshold,
)
from compressor.deploy import Place
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
from compressor.job.option_table import OptionTable
from compressor.job.options import (
    Origin,
    as_typed,
    as_words,
    kinds_of,
    require_kind,
    sparsities,
    to_toml,
)
from compressor.relevance import RelevanceConfig
from compressor.sparse import MaskAllocation, SparseConfig
from compressor.surgery import COMPENSATIONS
from compressor.training import (
    FINETUNE_DISTILL,
    RECALIBRATION_IMAGES,
    TRAINED_EPOCHS,
    TRAINED_LR,
    USUAL_LR,
    TrainingConfig,
)


@dataclass(frozen=True)
class Settings(OptionTable):
    """The options of one run; a wrong one is refused when the object is made.

    Raises:
        UnknownNameError: a criterion, measure, allocation, ... that does not exist.
        RangeError: a number outside its range.
        InputError: options that contradict each other, or would have no effect.
    """

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
        usual_lr = USUAL_LR.get(self.optimizer, TrainingConfig.lr)
        usual_lr = round(usual_lr * TRAINED_LR, 9) if self.weights else usual_lr  # 0.01, not 0.010000000000000002
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
        # What is usual depends on what else is said: on --when first of all, and half of --epochs are for fine-tuning.
        named |= {"when": self.when} if self.when != Settings.from_options(named).when else {}
        while unusual := self._unlike(Settings.from_options(named)):
            named |= unusual
        words = [word for name, value in named.items() for word in as_words(name, value)]
        return shlex.join(["compress", *words])

    def _unlike(self, other: Settings) -> dict[str, Any]:
        usual = other.given()
        return {name: value for name, value in self.given().items() if value != usual.get(name)}

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
