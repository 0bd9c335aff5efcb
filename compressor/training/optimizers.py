"""The optimizer of a training, and its learning rate from step to step.

A worked example: lr = 1, warmup = 0.2, ten steps. The rise takes two of them, the fall the other eight:

    step   0    1    2    3     4     5     6    7     8     9
    rate   0.5  1    1    0.96  0.85  0.69  0.5  0.31  0.15  0.04
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from compressor.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear rise to `config.lr`, then half a cosine towards 0.

    Source: Loshchilov & Hutter, arXiv 1608.03983, without restarts; the rise as in Goyal et al., arXiv 1706.02677.
    """
    rise = config.warmup * total_steps
    if step < rise:
        # `step + 1`, so that the first step already learns; at most 1 where the rise ends between two steps.
        return config.lr * min(1.0, (step + 1) / rise)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total_steps - rise)))


def _decaying(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return two groups of parameters: weights, and what has one dimension, which does not decay."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """Return the optimizer of all parameters; the loop sets its learning rate before every step."""
    # One pass over all parameters instead of several over each: of one kernel on a GPU, of one loop on a CPU.
    parameters = _decaying(model, config) if not config.decay_norms else model.parameters()
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
    return SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,  # torch refuses Nesterov without momentum
        weight_decay=config.weight_decay,
        fused=True,
    )
