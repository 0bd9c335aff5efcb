"""What can be chosen about relevance, with every default and range; read from here by the command line as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from compressor.errors import InputError, RangeError, UnknownNameError

EstimatorName = Literal["gate", "soft", "mixed", "loss", "source"]
Exclusion = Literal["zero", "mean", "linear"]


@dataclass(frozen=True)
class RelevanceConfig:
    """How relevance observes training and what it concludes.

    Attributes:
        estimator: "gate" ranks by squared gate gradients, which add up when many channels go; "soft" by the finite
            effect of each channel alone; "loss" by the losses themselves; "mixed" is "soft", corrected by the losses;
            "source" is the published method.
        exclude: what an excluded channel is replaced by: "zero", its running "mean", or, "linear", what the other
            channels of its group predict of it, pixel by pixel. Relevance is then of what a cut with that compensation
            would lose: a copy, or a sum of two others, is worth nothing by "linear". None: "mean" for "loss", else
            "zero". The published method knows "zero" alone.
        drop: the share of channels that a sample draws, in (0, 0.5]; rounded so that `1 / drop` is a whole number.
        confidence: a channel that is more relevant than a dummy with a probability above this counts as relevant, in
            (0, 1]. It is cut only when the budget leaves no others, and drawn half as often, so that the undecided ones
            get the samples (not by "source", which draws all alike).
        dummies: channels without effect per group, at least 10.
        observe_every: on one step in so many samples draw; the others train as they would. None: one in eight where
            gradients tell, or more often where a period between cuts asks for it; every step where losses tell ("loss",
            "source").
        half_life: steps after which an observation counts half. None: one period between cuts.
        warmup: steps over which the share rises from 0 to `drop`. None: a twentieth of the training, 0 for "source".

    Raises:
        UnknownNameError: an estimator or an exclusion that does not exist.
        InputError: an exclusion that the published method does not know.
        RangeError: a number out of its range.
    """

    estimator: EstimatorName = "gate"
    drop: float = 0.05
    confidence: float = 0.99
    dummies: int = 100
    observe_every: int | None = None
    half_life: float | None = None
    warmup: int | None = None
    exclude: Exclusion | None = None

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.estimator not in get_args(EstimatorName):
            raise UnknownNameError("relevance estimator", self.estimator, get_args(EstimatorName))
        if self.exclude is not None and self.exclude not in get_args(Exclusion):
            raise UnknownNameError("exclusion", self.exclude, get_args(Exclusion))
        if self.estimator == "source" and self.exclude not in (None, "zero"):
            raise InputError(f"the published method excludes by zero: leave out exclude = {self.exclude}, or 'source'")
        if not 0 < self.drop <= 0.5:
            raise RangeError("drop", self.drop, "(0, 0.5]")
        if not 0 < self.confidence <= 1:
            raise RangeError("confidence", self.confidence, "(0, 1]")
        if not 10 <= self.dummies <= 10_000:
            raise RangeError("dummies", self.dummies, "10 to 10,000; 100 are usual")
        if self.observe_every is not None and self.observe_every < 1:
            raise RangeError("observe_every", self.observe_every, "1, 2, 3, ... steps")
        if self.half_life is not None and not self.half_life > 0:
            raise RangeError("half_life", self.half_life, "(0, inf) steps")
        if self.warmup is not None and self.warmup < 0:
            raise RangeError("warmup", self.warmup, "0, 1, 2, ... steps")

    @property
    def draw_one_in(self) -> int:
        """One channel in so many is drawn: `1 / drop`, as a whole number, so that each is drawn equally often."""
        return round(1 / self.drop)
