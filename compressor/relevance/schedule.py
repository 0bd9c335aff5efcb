"""How often samples draw while a network trains, how fast old observations are forgotten, and what can be resolved."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from statistics import NormalDist

from compressor.relevance.config import RelevanceConfig
from compressor.relevance.estimators import ESTIMATORS
from compressor.relevance.statistics import required_samples

POWER = 0.8  # the chance to see an effect that is there
HALF_LIFE = 100.0  # steps, where there is no period between cuts to go by
logger = logging.getLogger(__name__)


@dataclass
class ObservationSchedule:
    """When samples draw, in training steps; every `every`-th step is one on which they do.

    Attributes:
        config: what was chosen.
        every: as chosen; where that was left open, what is usual for the estimator, or less, by `fit`.
        half_life: steps after which an observation counts half.
    """

    config: RelevanceConfig
    every: int
    half_life: float

    @staticmethod
    def from_config(config: RelevanceConfig) -> ObservationSchedule:
        """Take what a user chose, and what is usual for the rest."""
        every = config.observe_every or ESTIMATORS[config.estimator].observe_every
        return ObservationSchedule(config, every, config.half_life or HALF_LIFE)

    def draws(self, step: int) -> bool:
        """Return whether samples draw in a step, counted from 0."""
        return step % self.every == 0

    def share(self, step: int) -> float:
        """Return the part of its draws that a channel takes up in a step: less than 1 in the warm-up."""
        return min(1.0, step / self.config.warmup) if self.config.warmup else 1.0

    @property
    def half_life_in_batches(self) -> float:
        """The half-life, counted in steps on which samples draw."""
        return self.half_life / self.every

    @property
    def decay(self) -> float:
        """By how much an observation counts less when the next one comes."""
        return float(0.5 ** (1 / self.half_life_in_batches))

    def required_steps(self, batch_size: int) -> int:
        """Return how many steps it takes at least, with samples drawing as often as was left open."""
        return self._least * self._required_batches(batch_size)

    @property
    def _least(self) -> int:
        return self.config.observe_every or 1

    def _required_batches(self, batch_size: int) -> int:
        # NOTE: For "source" a whole batch is one observation: all its samples draw the same channels.
        observations = batch_size if ESTIMATORS[self.config.estimator].per_sample else 1
        return required_batches(observations, 1 / self.config.draw_one_in, self.config.confidence)

    def fit(self, period: int, batch_size: int, half_life: float) -> None:
        """Let as many batches of a period draw as it takes to resolve something, as far as that was left open.

        Args:
            period: steps between two cuts.
            batch_size: samples in a step.
            half_life: from now on.
        """
        batches = self._required_batches(batch_size)
        # Never less often than before: a schedule that is fitted twice, by a resumed run say, must stay the same.
        before = self.every
        self.every = max(self._least, min(self.every, period // batches))
        self.half_life = half_life
        if self.every != before:
            logger.info(
                "samples draw on one step in %d, not in %d: of %d steps between two cuts it takes %d that draw",
                self.every, before, period, batches,
            )  # fmt: skip


def required_batches(batch_size: int, drop: float, confidence: float) -> int:
    """Return how many batches that draw resolve a channel that saves one deviation of the loss.

    At `confidence`, with a power of 80 %: the strongest effect that can be hoped for, as for a fair part of the samples
    the channel alone would decide between a good and a bad loss. Gate gradients are as uncertain as they are large
    (`V = g^2`), so this holds for them too.

    Args:
        batch_size: observations in a batch.
        drop: the share of them that draw a channel.
        confidence: of the test, in (0, 1].
    """
    # No channel passes at 1, and below 1 - POWER nearly all do: there is no test then, and nothing to resolve.
    if not 1 - POWER < confidence < 1:
        return 1
    quantile = NormalDist().inv_cdf
    return -(-required_samples(1.0, 1.0, drop, quantile(confidence), quantile(POWER)) // batch_size)
