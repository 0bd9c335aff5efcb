"""How to train: the settings, the learning rate that they mean, and the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from compressor.errors import RangeError, UnknownNameError

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: how often the training part is gone through.
        batch_size: images in a step. An incomplete last batch of an epoch is left out.
        lr: the highest learning rate; see `learning_rate`.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        momentum: of SGD; AdamW's first beta.
        weight_decay: on all parameters.
        warmup: share of the steps over which the learning rate rises.
        label_smoothing: share of the target that is spread over all classes.
        augment: move and mirror training images at random.
        amp: compute in bfloat16 where torch.autocast allows.
        channels_last: keep images and weights in channels-last memory order, which GPUs prefer.
        seed: of the order of the images, the augmentation, and torch's global generator (dropout).
        device: where to train.

    Raises:
        RangeError, UnknownNameError: a value outside its range.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.15
    label_smoothing: float = 0.0
    augment: bool = True
    amp: bool = False
    channels_last: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        allowed = {
            "epochs": ("0, 1, 2, ...", self.epochs >= 0),
            "batch_size": ("1, 2, 3, ...", self.batch_size >= 1),
            "lr": ("(0, inf)", 0 < self.lr < math.inf),
            "momentum": ("[0, 1)", 0 <= self.momentum < 1),
            "weight_decay": ("[0, inf)", 0 <= self.weight_decay < math.inf),
            "warmup": ("[0, 1)", 0 <= self.warmup < 1),
            "label_smoothing": ("[0, 1)", 0 <= self.label_smoothing < 1),
        }
        for name, (text, holds) in allowed.items():
            if not holds:
                raise RangeError(name, getattr(self, name), text)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Give the learning rate of a step, counted from 0: a linear rise to `config.lr`, then half a cosine towards 0.

    Source: Loshchilov & Hutter, arXiv 1608.03983, without restarts; the rise as in Goyal et al., arXiv 1706.02677.
    """
    rise = config.warmup * total_steps
    if step < rise:
        return config.lr * min(1.0, (step + 1) / rise)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total_steps - rise)))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """Give the optimizer of all parameters."""
    parameters = model.parameters()
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )
