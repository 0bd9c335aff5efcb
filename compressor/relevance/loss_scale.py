"""Brings losses and gradients into units of the losses' running deviation.

Losses fall while a network trains, and their spread falls with them. In its own unit an early step would outweigh
many late ones, which know the network as it is now. Where a loop has no losses of single samples (a detector's), every
batch counts alike instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.relevance.estimators import BatchRecord, Estimator
from compressor.relevance.observation import Observation
from compressor.relevance.statistics import ControlVariate, Increment, RunningMean


class LossScale:
    """What is known of the losses: their running mean, their running deviation, and how an ungated run predicts them.

    Args:
        estimator: whether it observes single samples, or batches as a whole.
        device: of the losses.
    """

    def __init__(self, estimator: Estimator, device: torch.device) -> None:
        self._estimator = estimator
        self._level, self._variance = RunningMean(device=device), RunningMean(device=device)
        self._control = ControlVariate(device)

    def normalised(self, observation: Observation, number: int, decay: float, factor: Tensor) -> BatchRecord:
        """Return batch `number` in units of the running deviation, which is brought up to date first.

        Args:
            observation: a batch after its backward pass; without losses it is its own unit.
            number: of the batch, from 0.
            decay: by how much what was learned before counts less.
            factor: `(N,)`, by how much losses correct gradients; handed on.

        Raises:
            InputError: there was no backward pass, and the estimator reads gradients.
        """
        if observation.losses is None:
            return _by_gradients_alone(observation, factor)
        losses = observation.losses.to(observation.gates.dtype)
        gradients = observation.gradients() if self._estimator.soft else torch.zeros_like(observation.gates)
        excess, unit = self._learn(losses, number, decay)
        residual = torch.ones_like(unit)
        controlled = observation.ungated is not None
        if observation.ungated is not None:
            losses, residual = self._control.reduce(losses, observation.ungated.to(losses), decay)
        return BatchRecord(
            losses=losses * unit,
            residual=residual,
            controlled=controlled,
            excess_loss=excess * unit,
            draw=observation.draw,
            gates=observation.gates.detach(),
            gradients=gradients * unit,
            factor=factor,
        )

    def _learn(self, losses: Tensor, number: int, decay: float) -> tuple[Tensor, Tensor]:
        """Return the mean loss above its running mean, and one over the running deviation; then the means go on."""
        level = self._level
        per_sample = self._estimator.per_sample
        # Against the mean of the batches before: a mean that holds this batch would take a part of its excess away.
        excess = torch.where(level.weights[0] > 0, losses.mean() - level.mean(), 0.0)
        # Where a batch is one observation, the deviation is that of batch means; the first has nothing to differ from.
        centred = losses - losses.mean() if per_sample else excess.expand(1)
        freedom = len(losses) - 1 if per_sample else (level.weights[0] > 0).to(losses)
        level.add(number, Increment(losses.mean(), torch.ones_like(excess)), decay)
        squares = Increment(centred.square().sum(), torch.as_tensor(freedom, device=losses.device))
        self._variance.add(number, squares, decay)
        deviation = self._variance.mean().sqrt()
        return excess, torch.where(deviation > 0, 1 / deviation, 0.0)

    def _running(self) -> dict[str, RunningMean]:
        means = {"level": self._level, "variance": self._variance}
        return means | {"control_slope": self._control.slope, "control_residual": self._control.residual}

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all sums."""
        return {name: mean.state_dict() for name, mean in self._running().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, mean in self._running().items():
            mean.load_state_dict(state[name])


def _by_gradients_alone(observation: Observation, factor: Tensor) -> BatchRecord:
    """Return a batch in units of its own gradients: the length of a sample's, root mean square over samples.

    A mean loss has a B-th of a single one's gradients, a gradient scaler multiplies them, accumulation divides them:
    whatever the loop did to its loss is a factor, and goes out here.
    """
    gradients = observation.gradients()
    length = gradients.square().sum(1).mean().sqrt()
    none = torch.zeros_like(length)
    return BatchRecord(
        losses=none.expand(len(gradients)),
        residual=torch.ones_like(length),
        controlled=False,
        excess_loss=none,
        draw=observation.draw,
        gates=observation.gates.detach(),
        gradients=gradients * torch.where(length > 0, 1 / length, 0.0),
        factor=factor,
    )
