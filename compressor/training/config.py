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
USUAL_LR = {"sgd": 0.05, "adamw": 1e-3}  # AdamW's steps do not shrink with the gradients: at 0.05 it diverges
TRAINED_LR = 0.2  # of that, where training goes on from weights
TRAINED_EPOCHS = 8  # and a third of the epochs
RECALIBRATION_IMAGES = 2000  # 20 batches of 100: enough to average over, far from the cost of an epoch
FINETUNE_DISTILL = 0.5  # the teacher's share: the model as it was before the cut is there anyway


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: how often the train split is gone through.
        batch_size: images in a step, of all ranks together. An incomplete last batch of an epoch is left out.
        accumulate: parts in which a rank runs its images of a step, one after the other; their gradients add up.
        lr: the highest learning rate; see `learning_rate`.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        momentum: of SGD; AdamW's first beta.
        weight_decay: on all parameters, or on those of two dimensions and more.
        decay_norms: whether norms and biases, parameters of one dimension, decay as well.
        clip_norm: the largest norm of all gradients together; larger ones are scaled down.
        warmup: share of the steps over which the learning rate rises.
        label_smoothing: share of the target that is spread over all classes.
        mixup, cutmix: alpha of either way to mix images with others of their batch; 0 mixes nothing. See `data.mixing`.
        distill: a teacher's share of the loss, in [0, 1]; see `distilled`.
        temperature: of the teacher's soft targets.
        augment: let training images differ every time.
        crop, jitter: how; see `Augmentation`.
        ema: decay of a moving average of the weights, which validation looks at and which is kept in the end; 0 keeps
            none. See `MovingAverage`.
        balanced: draw training images so that every class comes equally often, rare ones again and again.
        amp: compute in bfloat16 where torch.autocast allows.
        channels_last: keep images and weights in channels-last memory order, which GPUs prefer.
        sync_batchnorm: let BatchNorm look at the images of all ranks together, on GPUs.
        compile: run the training steps through torch.compile; compiled anew after every cut.
        seed: of the order of the images, the augmentation, and torch's global generator (dropout).
        device: where to train.

    Raises:
        RangeError, UnknownNameError: a value outside its range.
    """

    epochs: int = 24
    batch_size: int = 64
    accumulate: int = 1
    lr: float = USUAL_LR["sgd"]
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norms: bool = True
    clip_norm: float | None = None
    warmup: float = 0.15
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    augment: bool = True
    crop: float = 0.0
    jitter: float = 0.0
    ema: float = 0.0
    balanced: bool = False
    amp: bool = False
    channels_last: bool = False
    sync_batchnorm: bool = False
    compile: bool = False
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
            "accumulate": ("1 to half of batch_size", 1 <= self.accumulate <= self.batch_size // 2),
            "ema": ("[0, 1)", 0 <= self.ema < 1),
            "lr": ("(0, inf)", 0 < self.lr < math.inf),
            "momentum": ("[0, 1)", 0 <= self.momentum < 1),
            "weight_decay": ("[0, inf)", 0 <= self.weight_decay < math.inf),
            "clip_norm": ("(0, inf)", self.clip_norm is None or 0 < self.clip_norm < math.inf),
            "mixup": ("[0, inf)", 0 <= self.mixup < math.inf),
            "cutmix": ("[0, inf)", 0 <= self.cutmix < math.inf),
            "crop": ("[0, 1]", 0 <= self.crop <= 1),
            "jitter": ("[0, 1]", 0 <= self.jitter <= 1),
            "distill": ("[0, 1]", 0 <= self.distill <= 1),
            "temperature": ("(0, inf)", 0 < self.temperature < math.inf),
            "warmup": ("[0, 1)", 0 <= self.warmup < 1),
            "label_smoothing": ("[0, 1)", 0 <= self.label_smoothing < 1),
            # Torch takes it as a seed, and TOML, whose whole numbers have 64 bits and a sign, can write it down.
            "seed": ("0 to 2**63 - 1", 0 <= self.seed < 2**63),
        }
        for name, (text, holds) in allowed.items():
            if not holds:
                raise RangeError(name, getattr(self, name), text)
