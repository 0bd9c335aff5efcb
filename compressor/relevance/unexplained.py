"""What the other channels of a group do not predict of a channel, and running covariances to know it from.

    e = (z - mu) M,    M = C^-1 / diag(C^-1)     column by column: what is left of the regression on all others

    z = [a, b, a + b] in every pixel: e is 0 for each of the three, and any one of them may go for nothing
    z = [a, b], uncorrelated:         M = 1, e = z - mu

Where no bias or running mean behind a consumer could take mu, it is 0, and C holds uncentred second moments.

Shape letters: C channels of a group; K positions that one channel holds; D positions of an input; N rows, one for each
sample and place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Of a channel's variance: a prediction that explains more is rounding, and would make rounding look like relevance.
_LEAST_RIDGE = 1e-6
REFRESH_EVERY = 8  # tracked inputs: covariances change slowly, and an inverse takes the third power of a width


def unexplained_part(covariance: Tensor, rows: float = torch.inf) -> Tensor:
    """Return M, `(C, C)` float64, from a covariance `(C, C)`.

    Args:
        covariance: of the channels of one group, at one consumer.
        rows: how many it is from. C channels predict each other from N rows by chance alone up to C / N, and that much
            of each variance is added to its diagonal.
    """
    c = covariance.double()
    scale = c.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    ridge = max(_LEAST_RIDGE, len(c) / rows)
    correlation = c / scale / scale.unsqueeze(1) + ridge * torch.eye(len(c), dtype=c.dtype, device=c.device)
    inverse = torch.linalg.inv(correlation)
    left: Tensor = inverse / inverse.diagonal() / scale.unsqueeze(1) * scale
    return left


@dataclass(eq=False)
class RunningCovariances:
    """Decaying sums of the covariances of one input, block by block, for every group that it holds.

    Attributes:
        blocks: by group name, the positions of its channels, `(C, K)` for each block that predicts within itself.
        centred: whether products are about the mean, or else about zero.
        products: by group name, `(blocks, C, C)` float64, sums of what batches had.
        rows, count: decaying sums of rows, and of ones.
    """

    blocks: dict[str, list[Tensor]]
    centred: bool = True
    products: dict[str, Tensor] = field(default_factory=dict)
    rows: float = 0.0
    count: float = 0.0
    _parts: dict[str, list[Tensor]] = field(default_factory=dict)
    _age: int = 0

    def add(self, rows: Tensor, decay: float) -> None:
        """Take one more input, `(N, D)`; what is centred is centred by its own mean."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows - rows.mean(0) if self.centred else rows
        for name, blocks in self.blocks.items():
            new = torch.stack([_covariance(rows[:, each.to(rows.device)]) for each in blocks]).double()
            self.products[name] = self.products[name].to(new) * decay + new if name in self.products else new
        self.rows = self.rows * decay + len(rows)
        self.count = self.count * decay + 1
        self._age += 1

    def unexplained(self, h: Tensor, dim: int, mean: Tensor | None) -> Tensor:
        """Return of every position of an input what the others do not predict, in the shape of `h`.

        Zero where nothing is known of a position; differentiable by `h`.

        Args:
            h: the input, its channels on dimension `dim`.
            mean: `(D,)`, of its positions; None for zero.
        """
        if self._age >= REFRESH_EVERY or self._parts.keys() != self.products.keys():
            self._parts = {
                name: [unexplained_part(each / self.count, self.rows) for each in products]
                for name, products in self.products.items()
            }
            self._age = 0
        values = h.movedim(dim, -1)
        centred = values if mean is None else values - mean.to(values)
        left = torch.zeros_like(values)
        for name, parts in self._parts.items():
            for positions, part in zip(self.blocks[name], parts, strict=True):
                at = positions.to(h.device)
                left[..., at] = torch.einsum("...ck,cd->...dk", centred[..., at], part.to(values))
        return left.movedim(-1, dim)

    def narrow_from(self, before: RunningCovariances, keep: Mapping[str, Tensor]) -> None:
        """Take over, after a cut, what was known of the channels that stayed."""
        self.rows, self.count = before.rows, before.count
        for name in self.blocks.keys() & before.products.keys():
            products = before.products[name]
            kept = keep[name].to(products.device) if name in keep else torch.arange(products.shape[1])
            self.products[name] = products[:, kept][:, :, kept]


def _covariance(values: Tensor) -> Tensor:
    """Return `(C, C)`, the mean products of values `(N, C, K)`."""
    lines = values.movedim(2, 1).flatten(0, 1)
    return lines.T @ lines / len(lines)
