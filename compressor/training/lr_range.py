"""A learning rate for this model, these images and this recipe, from a short trial.

The rate rises from step to step, tenfold in every seventh of the trial. The loss falls, until steps become too wide and
it rises. A tenth of the rate at the lowest (smoothed) loss is well on the safe side.

    rate    1e-5 ... 0.01   0.05   0.1   0.3   0.9     3
    loss     2.3 ...  2.1    1.8   1.7   1.6   1.9   9.0      lowest at 0.3: returns 0.03

Source: Smith, arXiv 1506.01186, section 3.3.
"""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import TrainingError
from compressor.graph import copied
from compressor.training.config import TrainingConfig
from compressor.training.data.sources import Data
from compressor.training.hooks import PlainStep
from compressor.training.loop import train

_STEPS = 100
_LOWEST, _HIGHEST = 1e-5, 100.0  # more than SGD takes, and less than AdamW
_SMOOTHING = 0.9
_WILD = 3.0  # times the lowest loss: nothing better comes after it
_SAFE = 10.0

logger = logging.getLogger(__name__)


class _Found(Exception):
    """The trial is over."""


def find_learning_rate(model: nn.Module, data: Data, config: TrainingConfig) -> float:
    """Return a highest learning rate for `train`; the model stays as it is.

    Args:
        model: on any device.
        data: its train split is learnt from, for a hundred steps, or two epochs where these are fewer.
        config: the recipe; its own rate has no effect.

    Raises:
        TrainingError: the loss is not finite from the beginning.
    """
    trial = _Trial()
    epochs = max(2, math.ceil(_STEPS * config.batch_size / len(data.train)))
    config = replace(config, epochs=epochs, warmup=0.0, ema=0.0, distill=0.0, compile=False, lr=_LOWEST)
    with suppress(_Found):
        train(copied(model), data, config, trial.hook)
    if not trial.losses:
        raise TrainingError(math.nan, 1, _LOWEST, 1)
    lowest = min(range(len(trial.losses)), key=trial.losses.__getitem__)
    found = float(f"{trial.rates[lowest] / _SAFE:.2g}")
    logger.info(
        "a trial of %d steps had its lowest loss, %.3g, at a rate of %.2g: lr = %g",
        len(trial.losses), trial.losses[lowest], trial.rates[lowest], found,
    )  # fmt: skip
    return found


class _Trial:
    """What the steps of a trial came to."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._mean = 0.0

    def hook(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> PlainStep:
        """Make what takes part in its steps."""
        return _RisingRate(self, model, optimizer, min(_STEPS, total_steps))

    def add(self, rate: float, loss: float) -> bool:
        """Take in a step; return whether more of them would tell nothing."""
        # The mean of the last losses, without the bias towards 0 that it has in the beginning.
        self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        smoothed = self._mean / (1 - _SMOOTHING ** (len(self.losses) + 1))
        if not math.isfinite(smoothed):
            return True
        self.rates.append(rate)
        self.losses.append(smoothed)
        return smoothed > _WILD * min(self.losses)


class _RisingRate(PlainStep):
    """Sets the rate of every step."""

    def __init__(self, trial: _Trial, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        super().__init__(model, optimizer, steps)
        self._trial = trial
        self._optimizer = optimizer
        self._steps = steps
        self._done = 0
        self._loss = torch.zeros(())

    def loss(self, inputs: Tensor, targets: Tensor, loss_fn: object) -> Tensor:
        """Return the mean loss, and put the rate of this step in place of the loop's."""
        rate = _LOWEST * (_HIGHEST / _LOWEST) ** (self._done / max(1, self._steps - 1))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = super().loss(inputs, targets, loss_fn)  # type: ignore[arg-type]
        self._loss = loss.detach()
        self._rate = rate
        return loss

    def step(self) -> None:
        """Note what the step came to, and end the trial in time."""
        self._done += 1
        if self._trial.add(self._rate, float(self._loss)) or self._done == self._steps:
            raise _Found
