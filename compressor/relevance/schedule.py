"""How often samples draw while a network trains, how fast old observations are forgotten, and what can be resolved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compressor.errors import RangeError
from compressor.relevance.statistics import needed_samples

POWER = 0.84  # normal quantile of the chance, 80 %, to see an effect that is there


@dataclass
class Pace:
    """The pace of observation, in training steps; every `every`-th step is one on which samples draw.

    Attributes:
        every: may become less, by `fit`.
        least: `every` cannot become less than that.
        warmup: steps over which the share of channels that a sample draws rises from 0.
        half_life: steps after which an observation counts half.

    Raises:
        RangeError: a number out of its range.
    """

    every: int
    least: int
    warmup: int
    half_life: float

    @staticmethod
    def of(observe_every: int | None, usual: int, warmup: int, half_life: float) -> Pace:
        """Take what a user gave, and what is usual where `observe_every` was left open; it may then become less."""
        if observe_every is not None and observe_every < 1:
            raise RangeError("observe_every", observe_every, "1, 2, 3, ... steps")
        if warmup < 0:
            raise RangeError("warmup", warmup, "0, 1, 2, ... steps")
        if not half_life > 0:
            raise RangeError("half_life", half_life, "(0, inf) steps")
        return Pace(observe_every or usual, observe_every or 1, warmup, half_life)

    def draws(self, step: int) -> bool:
        """Tell whether samples draw in a step, counted from 0."""
        return step % self.every == 0

    def share(self, step: int) -> float:
        """Give the part of its draws that a channel takes up in a step: less than 1 in the warm-up."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    @property
    def half_life_in_batches(self) -> float:
        """The half-life, counted in steps on which samples draw."""
        return self.half_life / self.every

    @property
    def decay(self) -> float:
        """By how much an observation counts less when the next one comes."""
        return float(0.5 ** (1 / self.half_life_in_batches))

    def fit(self, period: int, batches: int, half_life: float) -> None:
        """Let at least so many batches of a period draw, as far as that was left open.

        Args:
            period: steps between two cuts.
            batches: how many must draw so that something is resolved.
            half_life: from now on.
        """
        self.half_life, self.every = half_life, max(self.least, min(self.every, period // batches))


def needed_batches(batch_size: int, drop: float, delta: float) -> int:
    """Give how many batches that draw resolve a channel that saves one deviation of the loss.

    At `delta`, with a power of 80 %: the strongest effect that can be hoped for, as for a fair part of the samples the
    channel alone would decide between a good and a bad loss. Gate gradients are as uncertain as they are large
    (`V = g^2`), so this holds for them too.

    Args:
        batch_size: observations in a batch.
        drop: the share of them that draw a channel.
        delta: of the test.
    """
    z_delta = float(torch.special.ndtri(torch.tensor(delta)))
    if not 0 < z_delta + POWER < math.inf:
        return 1
    return -(-needed_samples(1.0, 1.0, drop, z_delta, POWER) // batch_size)
