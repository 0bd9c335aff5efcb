"""What one training step says about the relevance of its channels: one plain function per estimator.

* `source`: the published method. The whole batch draws one subset, which is zeroed; what was out is credited with the
  batch's loss above its running mean.
* `loss`: every sample draws; what was drawn is replaced by its mean. Losses with a channel out against losses with it
  in, the batch being the expectation.
* `soft`: a drawn channel's gate `u` is uniform on (0, 1): the mean of `-dl/du` is `l(out) - l(in)`, at the variance of
  a gradient.
* `gate`: gates as `soft`, and its test; ranks by half the mean square of `dl/du`, which adds up when many channels go.

Shape letters: B samples; N channels of all groups, side by side; G groups; D dummies of each group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.intraining.statistics import Increment, contrast, finite_effect, squared_slope


@dataclass(frozen=True, eq=False)
class Step:
    """What one training step showed; losses and gradients in units of the losses' running deviation.

    Attributes:
        losses: `(B,)`.
        surprise: `()`, the batch's mean loss above its running mean.
        draw: `(B, N)` bool, which sample drew which channel; `(B, N + D * G)` where dummies are drawn along.
        gradients: `(B, N)`, of every sample's loss by its gates; zeros where the estimator excludes wholly.
    """

    losses: Tensor
    surprise: Tensor
    draw: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Estimator:
    """How an estimator excludes, and what it reads from a step.

    Attributes:
        measure: gives every channel's relevance in one step, for the test against dummies.
        rank: gives what ranks the channels, where that is not the relevance itself.
        soft: drawn channels get a gate uniform on (0, 1), and gradients are read; otherwise the gate is 0.
        towards_mean: excluded channels are replaced by their mean, as after a cut that folds it.
        per_sample: every sample draws for itself, not the batch as a whole.
    """

    measure: Callable[[Step], Increment]
    rank: Callable[[Step], Increment] | None = None
    soft: bool = False
    towards_mean: bool = False
    per_sample: bool = True


def credited(step: Step) -> Increment:
    """Credit what the batch excluded with its loss above expectation, as published: a sum, whoever was drawn how often.

    Divided by the mean number of draws, it has the unit of the other estimators.
    """
    out = step.draw[0].to(step.losses)
    return Increment(step.surprise * out, torch.full_like(out, float(out.mean())))


ESTIMATORS: dict[str, Estimator] = {
    "source": Estimator(credited, per_sample=False),
    "loss": Estimator(lambda step: contrast(step.losses, 1 - step.draw.to(step.losses)), towards_mean=True),
    "soft": Estimator(lambda step: finite_effect(step.gradients, step.draw), soft=True),
    "gate": Estimator(
        lambda step: finite_effect(step.gradients, step.draw),
        rank=lambda step: squared_slope(step.gradients),
        soft=True,
    ),
}
