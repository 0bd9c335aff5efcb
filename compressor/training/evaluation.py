"""Look at a model without training it: accuracy and loss, and BatchNorm statistics taken anew."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor._utils import Ranks
from compressor.errors import RangeError
from compressor.training.config import RECALIBRATION_IMAGES
from compressor.training.data.splits import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on a split.

    Attributes:
        accuracy: share of images whose highest score is that of their class, in `[0, 1]`.
        loss: mean cross-entropy in nats, without label smoothing.
        n: number of images.
        right_of, images_of: of every class, how many images were answered rightly, and how many there were.
    """

    accuracy: float
    loss: float
    n: int
    right_of: tuple[int, ...] = ()
    images_of: tuple[int, ...] = ()


def evaluate(
    model: nn.Module,
    split: Split,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    ranks: Ranks | None = None,
) -> Evaluation:
    """Return accuracy and loss of a model on a split, in evaluation mode; the model is left as it was.

    Args:
        model: on `device`; returns `(B, classes)` scores.
        split: images and their classes, taken in order and not augmented.
        batch_size: images at a time.
        device: where the batches are made.
        ranks: processes that share the work, each with the same model; every one gets the whole answer.
    """
    ranks = ranks or Ranks()
    # A process without an image would not know how many classes there are: few images are everybody's.
    is_shared = len(split) >= ranks.size
    own = split.part(ranks.rank, ranks.size) if is_shared else split
    # Counted on the device: one wait at the end instead of one for every batch.
    right, images = torch.zeros(2, 0, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with in_mode(model, training=False), torch.no_grad():
        for inputs, targets in own.batches(batch_size, device=device):
            outputs = model(inputs).float()  # a model in bfloat16 would round its own loss
            if not len(images):
                right, images = torch.zeros(2, outputs.size(1), dtype=torch.int64, device=device)
            images += torch.bincount(targets, minlength=len(images))
            right += torch.bincount(targets[outputs.argmax(1) == targets], minlength=len(images))
            loss += F.cross_entropy(outputs, targets, reduction="none").double().sum()
    if is_shared:
        ranks.sum_([right, images, loss])
    of_class = tuple(right.tolist()), tuple(images.tolist())
    return Evaluation(sum(of_class[0]) / len(split), float(loss) / len(split), len(split), *of_class)


def recalibrate(
    model: nn.Module,
    split: Split,
    images: int = RECALIBRATION_IMAGES,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
) -> None:
    """Take BatchNorm's running statistics anew, on training images that are not augmented; writes these buffers only.

    After a cut they still describe the inputs of the larger model. The new ones are plain averages over the batches:
    means of 1, 2 and 6 in three batches make a running mean of 3, where torch's usual momentum of 0.1 would make
    0.729 of the old mean + 0.081 * 1 + 0.09 * 2 + 0.1 * 6.

    Args:
        model: on `device`. One without BatchNorm that keeps statistics is left alone.
        split: the train split; images are drawn from it, the same ones each time.
        images: how many at most, in whole batches.
        batch_size: images at a time.
        device: where the batches are made.

    Raises:
        RangeError: fewer than two images, of which no variance can be taken.
    """
    # The private base class is the only one that 1d, 2d, 3d and synchronised BatchNorm share.
    norms = [norm for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        logger.info("%s has no BatchNorm that keeps statistics: nothing to recalibrate", type(model).__name__)
        return
    count = min(images, len(split))
    size = min(batch_size, count)
    if size < 2:
        raise RangeError("images" if count < 2 else "batch_size", size, "2, 3, 4, ...")
    # Whole batches only: a plain average would weigh the few images of an incomplete one as much as a hundred.
    drawn = split.batches(size, shuffle=torch.Generator().manual_seed(0), device=device)
    with in_mode(model, training=False), _averaging(norms), torch.no_grad():
        for inputs, _ in islice(drawn, count // size):
            model(inputs)


def running_statistics(model: nn.Module) -> Iterator[Tensor]:
    """Give the running means and variances that norms of batches keep."""
    for module in model.modules():
        # The private base class is the only one that 1d, 2d, 3d and synchronised BatchNorm, and InstanceNorm, share.
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            yield from (each for each in (module.running_mean, module.running_var) if each is not None)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set every module to training or evaluation mode, and each back to its own afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        # Not `model.train(before)`: a user may have left some modules in evaluation mode on purpose.
        for module, mode in before:
            module.training = mode


@contextmanager
def _averaging(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Let BatchNorms begin anew and weigh all batches alike."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain average over all batches
        norm.training = True  # BatchNorms only: dropout must not act on what they see
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
