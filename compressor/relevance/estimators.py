"""What one training step says about the relevance of its channels: one plain function per estimator.

* `source`: the published method. The whole batch draws one subset, which is zeroed; what was out is credited with the
  batch's loss above its running mean.
* `loss`: every sample draws; what was drawn is replaced by its mean. Losses with a channel out against losses with it
  in, the batch being the expectation; on some steps less what the same samples' losses without gates predict.
* `soft`: a drawn channel's gate `u` is uniform on (0, 1): the mean of `-dl/du` is `l(out) - l(in)`, at the variance of
  a gradient.
* `gate`: gates as `soft`, and its test; ranks by half the mean square of `dl/du`, which adds up when many channels go.
* `mixed`: `soft`, corrected by the losses as far as they resolve anything.

`statistics.py` has the formulas, on four channels.

Shape letters: B samples; N channels of all groups, side by side; G groups; D dummies of each group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.relevance.config import EstimatorName, Exclusion
from compressor.relevance.draws import independent_draws, stratified_draws
from compressor.relevance.statistics import (
    Increment,
    best_factor,
    corrected_effect,
    finite_effect,
    half_squared_gradient,
    loss_contrast,
)


@dataclass(frozen=True, eq=False)
class BatchRecord:
    """What one batch showed; losses and gradients in units of the losses' running deviation.

    Attributes:
        losses: `(B,)`, less what the control variate predicts, where there is one.
        residual: `()`, the share of the losses' variance that this leaves; 1 without a control variate.
        controlled: whether there is one.
        excess_loss: `()`, the batch's mean loss above its running mean.
        draw: `(B, N)` bool, which sample drew which channel; `(B, N + D * G)` where dummies are drawn along.
        gates: `(B, N)`.
        gradients: `(B, N)`, of every sample's loss by its gates; zeros where the estimator excludes wholly.
        factor: `(N,)`, by how much losses correct gradients, learned in the steps before; 0 at first.
    """

    losses: Tensor
    residual: Tensor
    controlled: bool
    excess_loss: Tensor
    draw: Tensor
    gates: Tensor
    gradients: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Estimator:
    """How an estimator excludes, and what it reads from a batch.

    Attributes:
        measure: returns every channel's relevance in one batch, for the test against dummies.
        rank: returns what ranks the channels, where that is not the relevance itself.
        learn: returns what the factor of the next steps is made of, where there is one.
        draw: who is drawn.
        soft: drawn channels get a gate uniform on (0, 1), and gradients are read; otherwise the gate is 0.
        exclude: what excluded channels are replaced by, unless the user says otherwise.
        per_sample: every sample draws for itself, not the batch as a whole.
        control_variate: on some steps the same samples also run without gates, to take their own share off the losses.
        observe_every: on one training step in so many samples draw, unless the user says otherwise.
    """

    measure: Callable[[BatchRecord], Increment]
    rank: Callable[[BatchRecord], Increment] | None = None
    learn: Callable[[BatchRecord], Increment] | None = None
    draw: Callable[..., Tensor] = stratified_draws
    soft: bool = False
    exclude: Exclusion = "zero"
    per_sample: bool = True
    control_variate: bool = False
    observe_every: int = 1

    @property
    def reads_losses(self) -> bool:
        """Whether it needs the losses of the samples; without, gradients by their gates say everything."""
        return not self.soft or self.control_variate


def credit_excluded(batch: BatchRecord) -> Increment:
    """Credit what the batch excluded with its loss above expectation, as published: a sum, whoever was drawn how often.

    Divided by the mean number of draws, it has the unit of the other estimators.
    """
    # NOTE: Those who are out get the credit. Crediting who is in with loss - E(loss) would keep the harmful ones.
    out = batch.draw[0].to(batch.losses)
    return Increment(batch.excess_loss * out, torch.full_like(out, float(out.mean())))


def contrast_losses(batch: BatchRecord) -> Increment:
    """Return losses with a channel out against losses with it in; a step weighs as one over its losses' variance."""
    return loss_contrast(batch.losses, 1 - batch.draw.to(batch.losses)).weighted(1 / batch.residual)


def integrate_gates(batch: BatchRecord) -> Increment:
    """Return the finite effect from the gate gradients of the samples that drew a channel."""
    return finite_effect(batch.gradients, batch.draw)


def square_gradients(batch: BatchRecord) -> Increment:
    """Return half the mean square of the gate gradients of all samples."""
    # All samples, drawn or not: the slope at gate 1 tells as much of a channel, and there are 1 / drop times as many.
    return half_squared_gradient(batch.gradients)


def correct_by_losses(batch: BatchRecord) -> Increment:
    """Return the finite effect from the gate gradients, corrected by the losses."""
    return corrected_effect(batch.losses, batch.gradients, batch.gates, batch.factor)


def learn_factor(batch: BatchRecord) -> Increment:
    """Return the factor that would have corrected best, for the steps to come."""
    return best_factor(batch.losses, batch.gradients, batch.gates)


# NOTE: Gate gradients say enough on one step in eight, and what is drawn does not learn: draws in every step cost a
# point of accuracy (docs/relevance.md). Losses are so noisy that those estimators need every step.
ESTIMATORS: dict[EstimatorName, Estimator] = {
    "source": Estimator(credit_excluded, per_sample=False),
    "loss": Estimator(contrast_losses, exclude="mean", control_variate=True),
    "soft": Estimator(integrate_gates, soft=True, observe_every=8),
    # Ranked by squares, but tested by signed effects: a square is never below zero, so no dummy could be like it.
    "gate": Estimator(integrate_gates, rank=square_gradients, soft=True, observe_every=8),
    "mixed": Estimator(
        correct_by_losses, learn=learn_factor, draw=independent_draws, soft=True, control_variate=True, observe_every=8
    ),
}
