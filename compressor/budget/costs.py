"""Costs of a model after any cut, in closed form from its graph: nothing is run, nothing is cut.

Every cost is a sum of terms `constant * product of axis sizes`, and the size of an axis is `fixed + sum(positions per
channel * kept channels)`. Compiled into arrays once, one evaluation takes microseconds, and counts stay exact integers.

Shape letters: G groups, T terms, E different axes (extents), W axes of the widest term, B cuts evaluated together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from compressor.budget.budget import MEASURES, Cost
from compressor.errors import RangeError, UnknownNameError
from compressor.graph import ChannelGraph, Extent, Term

IntArray: TypeAlias = NDArray[np.int64]


class CostModel:
    """Counts of parameters, multiply-adds and channels, as functions of how many channels of each group are kept.

    Everywhere below, `kept` gives the number of channels that stay, from 0 to the group's size, by group name; groups
    that it does not name stay whole.

    Args:
        graph: read once; after a cut, make another cost model.

    Attributes:
        dense: by measure, the count with every channel kept.

    A cost of another kind, latency say, is worked out from the graph when it is first asked for.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._sizes = graph.sizes()
        channels = Term(1, (Extent(0, dict.fromkeys(self._sizes, 1)),))
        terms = {"params": graph.params, "macs": graph.macs, "channels": (channels,)}
        self._graph = graph
        self._sums: dict[str | Cost, Callable[[IntArray], IntArray]] = {
            measure: _Sum(terms[measure], list(self._sizes)) for measure in MEASURES
        }
        self.dense: Mapping[str, int] = {measure: self.measure(measure, {}) for measure in MEASURES}

    def params(self, kept: Mapping[str, int]) -> int:
        """Return the number of parameters."""
        return self.measure("params", kept)

    def macs(self, kept: Mapping[str, int]) -> int:
        """Return the number of multiply-adds for the graph's example inputs, the whole batch."""
        return self.measure("macs", kept)

    def channels(self, kept: Mapping[str, int]) -> int:
        """Return the number of channels in the graph's groups."""
        return self.measure("channels", kept)

    def measure(self, measure: str | Cost, kept: Mapping[str, int]) -> int:
        """Return the count of one of `MEASURES`, or of another cost.

        Raises:
            UnknownNameError: no such measure or group.
            RangeError: more channels than the group has, or fewer than none.
        """
        return int(self._sum(measure)(self._counts(kept))[0])

    def rows(self, measure: str | Cost, kept: IntArray) -> IntArray:
        """Return the counts, `(B,)`, of many choices at once: `(B, G)` kept channels in the order of the groups."""
        return self._sum(measure)(kept)

    def per_channel(self, measure: str | Cost, kept: Mapping[str, int]) -> dict[str, float]:
        """Return what one channel of each group costs now: the difference that keeping one channel less makes.

        Of a cost that falls in steps, the mean over half of the channels: one alone may make no difference.

        Raises:
            UnknownNameError, RangeError: as for `measure`.
        """
        counts = self._counts(kept)
        fewer = np.ones_like(counts) if isinstance(measure, str) else np.maximum(counts // 2, 1)
        less = np.maximum(counts - np.diag(fewer[0]), 0)
        count = self._sum(measure)
        return dict(zip(self._sizes, ((count(counts) - count(less)) / fewer[0]).tolist(), strict=True))

    def _sum(self, measure: str | Cost) -> Callable[[IntArray], IntArray]:
        if measure not in self._sums:
            if isinstance(measure, str):
                raise UnknownNameError("measure", measure, MEASURES)
            self._sums[measure] = measure.count(self._graph)
        return self._sums[measure]

    def _counts(self, kept: Mapping[str, int]) -> IntArray:
        """Return the kept channels of all groups as one row, `(1, G)`."""
        for name, count in kept.items():
            if name not in self._sizes:
                raise UnknownNameError("group", name, self._sizes)
            if not 0 <= count <= self._sizes[name]:
                raise RangeError(f"kept[{name!r}]", count, f"[0, {self._sizes[name]}]")
        return np.array([list((self._sizes | dict(kept)).values())], dtype=np.int64)


class _Sum:
    """A sum of terms as arrays: axis sizes are one sparse matrix product, terms are one product along a row."""

    def __init__(self, terms: Sequence[Term], names: Sequence[str]) -> None:
        filler = Extent(1)  # short terms are filled up to W axes with axes of size 1
        width = max((len(term.extents) for term in terms), default=0)
        padded = [[*term.extents, *[filler] * (width - len(term.extents))] for term in terms]
        rows: dict[Any, int] = {}
        axes = [[rows.setdefault(_key(extent), len(rows)) for extent in extents] for extents in padded]
        self._constants = np.array([term.constant for term in terms], dtype=np.int64)
        self._axes = np.array(axes, dtype=np.int64).reshape(len(terms), width)
        self._fixed = np.array([fixed for fixed, _ in rows], dtype=np.int64)[:, None]
        self._per_channel = _matrix([channels for _, channels in rows], names)

    def __call__(self, counts: IntArray) -> IntArray:
        """Return the sum for each row of kept channels: `(B, G)` in, `(B,)` out."""
        sizes = self._fixed + self._per_channel @ counts.T  # (E, B)
        total: IntArray = self._constants @ sizes[self._axes].prod(axis=1)  # (T, W, B) -> (T, B) -> (B,)
        return total


def _key(extent: Extent) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Return what makes two extents the same axis size, whatever is cut."""
    return extent.fixed, tuple(sorted(extent.per_channel.items()))


def _matrix(rows: Sequence[Sequence[tuple[str, int]]], names: Sequence[str]) -> csr_array:
    """Return positions per channel as a sparse matrix, `(E, G)`."""
    column = {name: index for index, name in enumerate(names)}
    entries = [(times, row, column[name]) for row, channels in enumerate(rows) for name, times in channels]
    times, row, col = np.array(entries, dtype=np.int64).reshape(-1, 3).T
    return csr_array((times, (row, col)), shape=(len(rows), len(names)), dtype=np.int64)
