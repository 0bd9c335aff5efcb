"""What the estimators measure, against what there is to measure: all subsets of a tiny network, enumerated.

A 2-4-1 network with fixed weights and noisy targets. Its loss is a square of sums over gates, so the mean over a
uniform gate is exact by Simpson's rule, and every expectation is a finite sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import compressor
from compressor.relevance import RelevanceConfig
from compressor.relevance.estimators import ESTIMATORS, BatchRecord
from compressor.relevance.relevance import Relevance
from compressor.relevance.statistics import ControlVariate, RunningMean

NOTE = (
    "2-4-1 network, 240 samples, half of the channels drawn. `worst z`: the largest difference, over four channels, "
    "between the mean of 10 seeds and the enumerated value, in standard errors of that mean (about 2 is usual for the "
    "worst of four). `bias %`: the same over the value of the most relevant channel. `variance per sample`: of what "
    "one sample says of a channel, mean over channels, in units of the variance of the loss. `source` is held against "
    "(1 - p) times the contrast: it counts one side only. `gate` is measured as it ranks, half the mean square."
)
SEEDS, SAMPLES, DROP, NOISE = 10, 240, 0.5, 0.5
SIMPSON = ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6))
Pattern = tuple[float, Tensor]  # probability, gates (4,)


def task() -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network, its inputs and the noisy targets."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        x = torch.randn(SAMPLES, 2, dtype=torch.float64)
        return model, x, model(x) + NOISE * torch.randn(SAMPLES, 1, dtype=torch.float64)


# -- enumeration


def soft_patterns(fixed: bool) -> list[Pattern]:
    """Return every pattern of gates at once: two of four channels drawn, or each with chance 1/2; gates uniform."""
    found = []
    for draw in itertools.product((False, True), repeat=4):
        if fixed and sum(draw) != 2:
            continue
        chance = 1 / 6 if fixed else 1 / 16
        for gates in itertools.product(*(SIMPSON if drawn else ((1.0, 1.0),) for drawn in draw)):
            weight = chance * math.prod(share for _, share in gates)
            found.append((weight, torch.tensor([u for u, _ in gates], dtype=torch.float64), draw))
    return found


def hard_patterns() -> list[Pattern]:
    """Return every subset of channels, in or out with chance 1/2."""
    return [(1 / 16, torch.tensor(each, dtype=torch.float64)) for each in itertools.product((0.0, 1.0), repeat=4)]


@torch.no_grad()
def losses(gates: Tensor, towards_mean: bool) -> Tensor:
    """Return the losses of all samples at these gates, `(B,)`."""
    model, x, y = task()
    h = model[1](model[0](x))
    centre = h.mean(0) if towards_mean else 0.0
    return (model[2](centre + gates * (h - centre)) - y).square()[:, 0]


def effect(channel: int, patterns: list[Any], towards_mean: bool) -> float:
    """Give loss out minus loss in, where the other gates are as in the patterns in which the channel is drawn."""
    total, chance = 0.0, 0.0
    for weight, gates, *draw in patterns:
        if draw and not draw[0][channel]:
            continue
        out, kept = gates.clone(), gates.clone()
        out[channel], kept[channel] = 0.0, 1.0
        total += weight * float((losses(out, towards_mean) - losses(kept, towards_mean)).mean())
        chance += weight
    return total / chance


def half_square(channel: int) -> float:
    """Give half the mean square of the gate gradient, over all samples."""
    model, x, y = task()
    total = 0.0
    with torch.no_grad():
        h, weights = model[1](model[0](x)), model[2].weight[0]
        for weight, gates, _ in soft_patterns(fixed=True):
            slope = 2 * (model[2](gates * h) - y)[:, 0] * weights[channel] * h[:, channel]
            total += weight * float(slope.square().mean()) / 2
    return total


def truth(estimator: str) -> Tensor:
    """Return what the estimator should measure, `(4,)`."""
    values = {
        "source": lambda c: 0.5 * effect(c, hard_patterns(), towards_mean=False),
        "loss": lambda c: effect(c, hard_patterns(), towards_mean=True),
        "soft": lambda c: effect(c, soft_patterns(fixed=True), towards_mean=False),
        "gate": half_square,
        "mixed": lambda c: effect(c, soft_patterns(fixed=False), towards_mean=False),
    }
    return torch.tensor([values[estimator](channel) for channel in range(4)])


# -- measurement


def run(estimator: str, controlled: bool, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the mean over all steps, `(4,)`, and the variance of single steps, `(4,)`, in units of the loss."""
    model, x, y = task()
    how = ESTIMATORS[estimator]
    relevance = Relevance(compressor.trace(model, x[:2]), RelevanceConfig(estimator=estimator, drop=DROP), seed=seed)
    control, factor, level, found = ControlVariate(), RunningMean(4), 0.0, []
    ungated = losses(torch.ones(4, dtype=torch.float64), towards_mean=False)
    for step in range(steps):
        with relevance.observe(SAMPLES) as observation:
            gated = (model(x) - y).square()[:, 0]
            observation.credit(gated)
        gated.mean().backward()
        seen, left = gated.detach(), torch.tensor(1.0)
        surprise = seen.mean() - level / step if step else seen.mean() * 0
        level += float(seen.mean())
        if controlled:
            seen, left = control.reduce(seen, ungated)
        gradients = observation.gradients() if how.soft else observation.gates.detach()
        gates = observation.gates.detach()
        what = BatchRecord(seen, left, controlled, surprise, observation.draw, gates, gradients, factor.mean())
        found.append((how.rank or how.measure)(what))
        if how.learn:
            factor.add(step, how.learn(what))
    totals, weights = torch.stack([each.totals for each in found]), torch.stack([each.weights for each in found])
    mean, single = totals.sum(0) / weights.sum(0), (totals / weights)[steps // 10 :]
    if not how.soft:  # against the dummies that were drawn along; see Evidence.ranking
        own = 1 - 1 / totals.shape[1]
        mean, single = own * (mean - mean[4:].mean()), own * (single - single[:, 4:].mean(1, keepdim=True))
    return mean[:4], single[:, :4].var(0)


def measure(estimator: str, controlled: bool, steps: int) -> dict[str, Any]:
    """Return one row."""
    runs = [run(estimator, controlled, steps, seed) for seed in range(SEEDS)]
    means, expected = torch.stack([mean for mean, _ in runs]).double(), truth(estimator).double()
    error, bias = means.std(0) / math.sqrt(SEEDS), means.mean(0) - expected
    variance = losses(torch.ones(4, dtype=torch.float64), towards_mean=False).var()
    unit = variance.square() if estimator == "gate" else variance
    return {
        "estimator": estimator + (" with control variate" if controlled else ""), "seeds": SEEDS, "steps": steps,
        "worst z": float((bias / error).abs().max()), "bias %": 100 * float(bias.abs().max() / expected.max()),
        "standard error %": 100 * float(error.max() / expected.max()),
        "variance per sample": SAMPLES * float(torch.stack([each for _, each in runs]).mean() / unit),
    }  # fmt: skip


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what measures every row, by its name."""
    plans = [("source", False, 3000), ("loss", False, 300), ("loss", True, 300), ("soft", False, 300)]
    plans += [("gate", False, 300), ("mixed", False, 300), ("mixed", True, 300)]
    return {f"{name} {controlled}": partial(measure, name, controlled, steps) for name, controlled, steps in plans}
