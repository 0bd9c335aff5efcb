"""How to train: every option with its default and its range, in one place; the command line reads them here.

    TrainingConfig()                              what `compress` does when nothing is typed
    replace(TrainingConfig(), optimizer="adamw", lr=1e-3)

Nothing here imports torch: `compress --help` shows these defaults and must answer at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.errors import RangeError, UnknownNameError

OPTIMIZERS = ("sgd", "adamw")
RECALIBRATION_IMAGES = 2000  # 20 batches of 100: enough to average over, far from the cost of an epoch


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: how often the train split is gone through.
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

    epochs: int = 24
    batch_size: int = 64
    lr: float = 0.05
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
        # Every range is written so that NaN, which compares false with everything, is outside of it.
        allowed = {
            "epochs": ("1 to 100,000", 1 <= self.epochs <= 100_000),
            # BatchNorm in training mode has no variance of one value, which is what one image of 1x1 is to it.
            "batch_size": ("2 to 1,000,000", 2 <= self.batch_size <= 1_000_000),
            "lr": ("(0, inf)", 0 < self.lr < math.inf),
            "momentum": ("[0, 1)", 0 <= self.momentum < 1),
            "weight_decay": ("[0, inf)", 0 <= self.weight_decay < math.inf),
            "warmup": ("[0, 1)", 0 <= self.warmup < 1),
            "label_smoothing": ("[0, 1)", 0 <= self.label_smoothing < 1),
            # Torch takes it as a seed, and TOML, whose whole numbers have 64 bits and a sign, can write it down.
            "seed": ("0 to 2**63 - 1", 0 <= self.seed < 2**63),
        }
        for name, (text, holds) in allowed.items():
            if not holds:
                raise RangeError(name, getattr(self, name), text)
