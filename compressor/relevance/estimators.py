"""What one training step says about the relevance of its channels: one plain function per estimator.

* `source`: the published method. The whole batch draws one subset, which is zeroed; what was out is credited with the
  batch's loss above its running mean.
* `loss`: every sample draws; what was drawn is replaced by its mean. Losses with a channel out against losses with it
  in, the batch being the expectation; on some steps less what the same samples' losses without gates foretell.
* `soft`: a drawn channel's gate `u` is uniform on (0, 1): the mean of `-dl/du` is `l(out) - l(in)`, at the variance of
  a gradient.
* `gate`: gates as `soft`, and its test; ranks by half the mean square of `dl/du`, which adds up when many channels go.
* `mixed`: `soft`, corrected by the losses as far as they resolve anything.

Shape letters: B samples; N channels of all groups, side by side; G groups; D dummies of each group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.relevance.draws import drawn, independently_drawn
from compressor.relevance.statistics import (
    Increment,
    best_factor,
    contrast,
    corrected_effect,
    finite_effect,
    squared_slope,
)


@dataclass(frozen=True, eq=False)
class Step:
    """What one training step showed; losses and gradients in units of the losses' running deviation.

    Attributes:
        losses: `(B,)`, less what the control variate foretells, where there is one.
        noise: `()`, the share of the losses' variance that this leaves; 1 without a control variate.
        controlled: whether there is one.
        surprise: `()`, the batch's mean loss above its running mean.
        draw: `(B, N)` bool, which sample drew which channel; `(B, N + D * G)` where dummies are drawn along.
        gates: `(B, N)`.
        gradients: `(B, N)`, of every sample's loss by its gates; zeros where the estimator excludes wholly.
        factor: `(N,)`, by how much losses correct gradients, learned in the steps before; 0 at first.
    """

    losses: Tensor
    noise: Tensor
    controlled: bool
    surprise: Tensor
    draw: Tensor
    gates: Tensor
    gradients: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Estimator:
    """How an estimator excludes, and what it reads from a step.

    Attributes:
        measure: gives every channel's relevance in one step, for the test against dummies.
        rank: gives what ranks the channels, where that is not the relevance itself.
        learn: gives what the factor of the next steps is made of, where there is one.
        draw: who is drawn.
        soft: drawn channels get a gate uniform on (0, 1), and gradients are read; otherwise the gate is 0.
        towards_mean: excluded channels are replaced by their mean, as after a cut that folds it.
        per_sample: every sample draws for itself, not the batch as a whole.
        controlled: on some steps the same samples' losses without gates are taken as a control variate.
        observe_every: on one training step in so many samples draw, unless the user says otherwise. Gate gradients tell
            enough on few steps, and what is drawn does not learn.
    """

    measure: Callable[[Step], Increment]
    rank: Callable[[Step], Increment] | None = None
    learn: Callable[[Step], Increment] | None = None
    draw: Callable[..., Tensor] = drawn
    soft: bool = False
    towards_mean: bool = False
    per_sample: bool = True
    controlled: bool = False
    observe_every: int = 1


def credited(step: Step) -> Increment:
    """Credit what the batch excluded with its loss above expectation, as published: a sum, whoever was drawn how often.

    Divided by the mean number of draws, it has the unit of the other estimators.
    """
    out = step.draw[0].to(step.losses)
    return Increment(step.surprise * out, torch.full_like(out, float(out.mean())))


def contrasted(step: Step) -> Increment:
    """Give losses with a channel out against losses with it in; a step weighs as one over its losses' variance."""
    return contrast(step.losses, 1 - step.draw.to(step.losses)).times(1 / step.noise)


def gradual(step: Step) -> Increment:
    """Give the finite effect from the gate gradients of the samples that drew a channel."""
    return finite_effect(step.gradients, step.draw)


def squared(step: Step) -> Increment:
    """Give half the mean square of the gate gradients of all samples."""
    return squared_slope(step.gradients)


def corrected(step: Step) -> Increment:
    """Give the finite effect from the gate gradients, corrected by the losses."""
    return corrected_effect(step.losses, step.gradients, step.gates, step.factor)


def correction(step: Step) -> Increment:
    """Give the factor that would have corrected best, for the steps to come."""
    return best_factor(step.losses, step.gradients, step.gates)


ESTIMATORS: dict[str, Estimator] = {
    "source": Estimator(credited, per_sample=False),
    "loss": Estimator(contrasted, towards_mean=True, controlled=True),
    "soft": Estimator(gradual, soft=True, observe_every=8),
    "gate": Estimator(gradual, rank=squared, soft=True, observe_every=8),
    "mixed": Estimator(
        corrected, learn=correction, draw=independently_drawn, soft=True, controlled=True, observe_every=8
    ),
}
