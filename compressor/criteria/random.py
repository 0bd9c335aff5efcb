"""The control: what a criterion must beat to have shown anything."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.criteria.snapshot import Snapshot
from compressor.errors import ScoreError
from compressor.graph import Group


def random(group: Group, snapshot: Snapshot) -> Tensor:
    """Return scores drawn uniformly from (0, 1): the baseline that every table needs.

    Returns:
        `(C,)` float32.

    Raises:
        ScoreError: the snapshot has no generator. The global one is never drawn from: scoring leaves it as it was.
    """
    generator = snapshot.generator
    if generator is None:
        instead = "pass Snapshot.from_model(model, generator=torch.Generator().manual_seed(0))"
        raise ScoreError(group.name, "random needs a generator, and the snapshot has none", instead)
    return torch.rand(group.size, generator=generator, device=generator.device)
