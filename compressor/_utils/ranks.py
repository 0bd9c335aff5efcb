"""The processes that train one model together, each on its own part of every batch (torch.distributed).

Two ranks, three samples each; what one rank knows of them, all ranks know afterwards, in the order of the ranks:

    rank 0 has [a, b, c], rank 1 has [d, e, f]      ranks.gathered(own) == [a, b, c, d, e, f] on both
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from compressor.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """Talks to the other processes of a group; alone, it hands back what it gets.

    Args:
        group: of torch.distributed; None where this process trains alone. Every rank calls every method equally often.

    Attributes:
        rank, size: this process's place, and how many there are.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = torch.distributed.get_rank(group) if group else 0
        self.size = torch.distributed.get_world_size(group) if group else 1

    def own_rows(self, everything: Tensor) -> Tensor:
        """Return this rank's part, `(B, ...)`, of what `gathered` would give, `(size * B, ...)`."""
        return everything.chunk(self.size)[self.rank]

    def gathered(self, own: Any) -> Any:
        """Return all ranks' samples: of every tensor `(B, ...)`, also inside of tuples and dicts, `(size * B, ...)`."""
        if self._group is None:
            return own

        def gather(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            sent = tensor.detach().contiguous()
            sent = sent.view(torch.uint8) if sent.dtype is torch.bool else sent  # gloo sends no bools
            parts = [torch.empty_like(sent) for _ in range(self.size)]
            torch.distributed.all_gather(parts, sent, group=self._group)
            return torch.cat(parts).view(tensor.dtype)

        return tree_map(gather, own)

    def mean(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of every tensor over the ranks."""
        if self._group is None:
            return dict(own)
        means = {}
        for name, tensor in own.items():
            means[name] = tensor / self.size
            torch.distributed.all_reduce(means[name], group=self._group)
        return means

    def of_the_first(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what rank 0 has, of the same names and shapes."""
        if self._group is None:
            return dict(own)
        taken = {name: tensor.clone() for name, tensor in own.items()}
        for tensor in taken.values():
            torch.distributed.broadcast(tensor, group=self._group, group_src=0)
        return taken

    def require_alike(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Compare a hash of whole numbers over the ranks.

        Raises:
            InputError: they differ. Every rank raises it.
        """
        if self._group is None:
            return
        text = repr([(name, tensor.tolist()) for name, tensor in sorted(tensors.items())])
        hashes: list[str] = [""] * self.size
        torch.distributed.all_gather_object(hashes, hashlib.sha256(text.encode()).hexdigest(), group=self._group)
        if len(set(hashes)) > 1:
            raise InputError(
                f"the {self.size} ranks have different {what}: begin on all of them with the same model, seed, "
                "options and calibration"
            )
