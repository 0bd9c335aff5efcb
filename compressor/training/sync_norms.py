"""BatchNorm over the images of all ranks, as long as they train together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from compressor._utils import Ranks
from compressor.errors import InputError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def synchronized_norms(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Let every BatchNorm be torch's SyncBatchNorm for a while; writes the model.

    The modules stay the same objects, so that optimizers, hooks and channel graphs need not know: `SyncBatchNorm` has
    the attributes of a `BatchNorm2d`, and one for the group. A rank that trains alone (a trial of learning rates, say)
    keeps its norms: they would wait for the others.
    """
    alone = ranks.size == 1
    changed = [(module, type(module)) for module in model.modules() if type(module) in _NORMS and not alone]
    try:
        for module, _ in changed:
            module.__class__ = nn.SyncBatchNorm
            vars(module)["process_group"] = ranks.group
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind
            del vars(module)["process_group"]


def require_synchronizable(ranks: Ranks, device: str) -> None:
    """Refuse what has nothing to synchronise, or cannot.

    Raises:
        InputError: a single process, or a CPU, for which torch has no SyncBatchNorm.
    """
    if ranks.size == 1:
        raise InputError(
            "--sync-batchnorm has no effect in one process: start several (torchrun --nproc-per-node N -m compressor "
            "...), or leave it out"
        )
    if device == "cpu":
        raise InputError(
            "--sync-batchnorm: torch's SyncBatchNorm runs on GPUs alone; leave it out, or give --device cuda"
        )
