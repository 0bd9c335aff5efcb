"""Linear compensation: what removed channels carry is predicted from those that stay, and moved into their weights.

Channels of one group are correlated. Pixel by pixel, of the channels R that go and K that stay,

    z_R ~ mu_R + A (z_K - mu_K),   A = Cov_RK (Cov_KK + ridge)^-1

so a consumer with weight W loses least when `W[:, K] += W[:, R] A`, and `W[:, R] (mu_R - A mu_K)` goes into the next
bias or running mean. With A = 0 that is compensation by the mean alone.

    z = [1, 2] in one pixel, [2, 4] in another: channel 1 is twice channel 0, A = [[2]]
    consumer W = [[5, 1]], channel 1 goes: W[:, 0] becomes 5 + 1 * 2 = 7, and nothing was lost

The best A may be one that nobody can train on from. Where a channel that stays hardly varies, the consumer's weight on
it becomes a hundred times as large, and so does the gradient of whatever computes that channel. What is moved is
therefore at most four times as large as what goes: all variances get a floor, the least one that keeps to it.

    z_0 = 0.01 z_1, z_1 goes: A = [[100]] and W = [[1, 1]] -> [[101]]; with the floor W[0, 0] stays below 5

Where no bias or running mean can take the constant, A is that of uncentred moments, `E[z_R z_K] E[z_K z_K]^-1`.
One A serves every tap of a kernel (exact but for padded borders), and every pixel that a flatten laid side by side:
a regression for each pixel would have as many times fewer samples. A grouped convolution has one A for each block.

Shape letters: D positions along the channel dimension of a consumer's input; C channels of a group, n of which stay
and r go; K positions that one channel holds along D; N rows, one for each sample and place of the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.graph import ChannelGraph, ConsumerInput, Group, is_torch_module, owner
from compressor.surgery.compensation import removed_means, require_finite, watch_inputs

_BY_MEAN, _BY_NOTHING = "compensated by the mean alone", "not compensated"  # begin notes

MOST_GROWTH = 4.0  # of what is moved, against what goes
# Parts of the largest variance in a group.
_VARIANCE_FLOORS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

# Eigenvalues of a correlation matrix below this, times its size, are rounding: such directions predict nothing.
_RANK_TOLERANCE = 1e-13


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of the inputs of all consumers.

    Attributes:
        means: `(D,)` float64 by the name of the consuming weight, where a bias or running mean is behind it.
        covariances: by consuming weight and group, `(blocks, C, C)` float64, of the group's channels in each block;
            uncentred second moments where there is no mean.
        samples: how many samples they are from.
    """

    means: Mapping[str, Tensor]
    covariances: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    samples: int = 0

    @staticmethod
    def of(known: Mapping[str, Tensor] | Moments | None) -> Moments:
        """Return what is known as moments, be it nothing, or means alone."""
        return known if isinstance(known, Moments) else Moments(known or {})

    def __bool__(self) -> bool:
        """Return whether anything is known."""
        return bool(self.means or self.covariances)


def input_moments(graph: ChannelGraph, batches: Iterable[Any]) -> Moments:
    """Return mean and covariance of every consumer's input; the model is left as it was.

    Consumers without a covariance are named in the graph's notes, once.

    Args:
        graph: of a model, which is run in evaluation mode.
        batches: inputs that the model accepts: tensors, tuples or dicts.

    Raises:
        InputError: no batch came, too few samples for every consumer, or what came is not finite, or not when squared.
    """
    sums = _sums(graph)
    watch_inputs(graph, sums, batches, "moments")
    seen = {weight: each for weight, each in sums.items() if each.rows}
    means = {weight: each.mean() for weight, each in seen.items() if weight in graph.offsets}
    require_finite(means)
    few = {weight: each for weight, each in seen.items() if each.needed() > each.samples}
    if few:
        why = max(few.values(), key=_Sums.needed).too_few()
        if len(few) == len(seen):
            raise InputError(f"compensate='linear' {why}, or compensate='mean'")
        _note_once(graph, _BY_MEAN, few.keys() & means.keys(), why)
        _note_once(graph, _BY_NOTHING, few.keys() - means.keys(), why)
    covariances = {
        (weight, name): found
        for weight, each in seen.items()
        if weight not in few
        for name, found in each.covariances(uncentred=weight not in means).items()
    }
    require_finite({weight: found for (weight, _), found in covariances.items()})
    _note_others(
        graph, means, covariances.keys() | {(weight, name) for weight in few for name in sums[weight].positions}
    )
    return Moments(means, covariances, max((each.samples for each in seen.values()), default=0))


def _note_once(graph: ChannelGraph, what: str, weights: Iterable[str], why: str) -> None:
    """Name consumers in the graph's notes, in the model's order.

    That they are fewer in later rounds, or other numbers in the reason, is not news: its first word tells it.
    """
    weights = set(weights)
    named = [name for name in _consumers(graph) if name in weights]
    reason = f"('linear' {why.partition(' ')[0]} "
    if named and not any(note.startswith(f"{what}: ") and reason in note for note in graph.notes):
        graph.note([f"{what}: {', '.join(named)} ('linear' {why})"])


def _note_others(graph: ChannelGraph, means: Mapping[str, Tensor], known: Iterable[tuple[str, str]]) -> None:
    """Name the consumers of which no covariance can be taken at all."""
    known = set(known)
    others = {weight for group in graph.groups for weight in _read_by(group) if (weight, group.name) not in known}
    why = "is of convolutions and Linear whose blocks are cut alike, and whose weight nobody else reads"
    _note_once(graph, _BY_MEAN, others & means.keys(), why)
    _note_once(graph, _BY_NOTHING, others - means.keys(), why)


def _consumers(graph: ChannelGraph) -> list[str]:
    return list(dict.fromkeys(weight for group in graph.groups for weight in _read_by(group)))


def _read_by(group: Group) -> list[str]:
    """Return the weights that read a group, also those whose input nobody sees."""
    return [each.tensor for each in group.of_role("consumer")] + [each.weight for each in group.consumer_inputs]


def _sums(graph: ChannelGraph) -> dict[str, _Sums]:
    found: dict[str, _Sums] = {}
    multiplied = _multiplied_alone(graph)
    for group in graph.groups:
        for seen in group.consumer_inputs:
            if seen.weight in graph.offsets or seen.weight in multiplied:
                at = found.setdefault(seen.weight, _Sums(seen.dim))
                blocks = channel_blocks(graph, seen)
                if blocks is not None:
                    at.positions[group.name] = blocks
    return found


def _multiplied_alone(graph: ChannelGraph) -> set[str]:
    """Return the weights that a convolution or Linear multiplies with its input, and that nobody else reads.

    What is moved within an embedding's weight, tied to that of a Linear, would change what the embedding gives.
    """
    readers: dict[str, set[str]] = {}
    for record in graph.recording.log.records:
        for origin in record.origins:
            if origin[0] == "tensor":
                readers.setdefault(str(origin[1]), set()).add(record.module)
    modules = dict(graph.model.named_modules())
    found = set()
    for weight, names in readers.items():
        name, _, leaf = weight.rpartition(".")
        module = modules.get(name)
        is_layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and is_torch_module(module)
        if names == {name} and leaf == "weight" and is_layer:
            found.add(weight)
    return found


def channel_blocks(graph: ChannelGraph, seen: ConsumerInput) -> list[Tensor] | None:
    """Return the positions of a group's channels block by block, `(C, K)` each; None where they are not cut alike."""
    module = graph.model.get_submodule(seen.module)
    weight = _tensor(graph, seen.weight)
    if weight.dim() < 2:
        return None
    if _input_dim(graph, seen.weight) == 0:
        return [seen.positions] if getattr(module, "groups", 1) == 1 else None
    width = weight.shape[1]  # of one block
    block = seen.positions // width
    if not (block == block[:1]).all():
        return None
    return [seen.positions[:, block[0] == index] for index in sorted(set(block[0].tolist()))]


def _input_dim(graph: ChannelGraph, weight: str) -> int:
    """Return the dimension of a weight that its input's channels lie on."""
    if offset := graph.offsets.get(weight):
        return offset.input_dim
    return 0 if isinstance(graph.model.get_submodule(owner(weight)[0]), nn.modules.conv._ConvTransposeNd) else 1


def _tensor(graph: ChannelGraph, name: str) -> Tensor:
    """Return a weight by name; a fixed kernel may be a buffer."""
    module, _, leaf = name.rpartition(".")
    found: Tensor = getattr(graph.model.get_submodule(module), leaf)
    return found


@dataclass
class _Sums:
    """A forward-pre-hook that adds up its module's first input, and the products of its channels.

    Sums are of what is left above the first batch's mean: sums of squares of large means would drown the variances.
    """

    dim: int
    positions: dict[str, list[Tensor]] = field(default_factory=dict)
    shift: Tensor | None = None
    total: Tensor | None = None
    products: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    samples: int = 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        h = inputs[0] if inputs else None
        if not isinstance(h, Tensor) or h.dim() < -self.dim:
            return
        rows = h.detach().movedim(self.dim, -1).flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self.shift is None or self.total is None:
            self.shift = rows.mean(0)
            self.total = torch.zeros_like(self.shift, dtype=torch.float64)
        rows = rows - self.shift
        self.total = self.total + rows.sum(0, dtype=torch.float64)
        for name, blocks in self.positions.items():
            new = torch.stack([_product(rows, each.to(rows.device)) for each in blocks]).double()
            self.products[name] = self.products[name] + new if name in self.products else new
        self.rows += len(rows)
        self.samples += len(h)

    def needed(self) -> int:
        """Return of how many samples a regression says something: as many rows as two for each channel."""
        rows = self.rows * min((blocks[0].shape[1] for blocks in self.positions.values()), default=1)
        return -(-2 * self._widest() * self.samples // rows)

    def too_few(self) -> str:
        """Return in words that there are less than that."""
        return (
            f"predicts each of {self._widest()} channels from the others, and {self.samples} samples are too few for "
            f"it: give {self.needed()} or more"
        )

    def _widest(self) -> int:
        return max((len(blocks[0]) for blocks in self.positions.values()), default=0)

    def mean(self) -> Tensor:
        """Return the mean, `(D,)` float64."""
        assert self.shift is not None
        assert self.total is not None
        return self.shift.double() + self.total / self.rows

    def covariances(self, *, uncentred: bool = False) -> dict[str, Tensor]:
        """Return `(blocks, C, C)` float64 by group."""
        assert self.total is not None
        centre = (self.total / self.rows).unsqueeze(0)
        mean = self.mean().unsqueeze(0)
        found = {}
        for name, blocks in self.positions.items():
            squares = torch.stack([_product(centre, each.to(centre.device)) for each in blocks])
            if uncentred:
                squares -= torch.stack([_product(mean, each.to(mean.device)) for each in blocks])
            count = torch.tensor([each.shape[1] for each in blocks]).to(squares).view(-1, 1, 1)
            found[name] = (self.products[name] / self.rows - squares) / count
        return found


def _product(rows: Tensor, positions: Tensor) -> Tensor:
    """Return the sum over rows and places of all products of two channels, `(C, C)`."""
    lines = rows[:, positions].movedim(2, 1).flatten(0, 1)
    return lines.T @ lines


# -- what a cut makes of it


@dataclass(frozen=True, eq=False)
class Merge:
    """How the weights of channels that stay take over from those that go, at one consumer.

    Attributes:
        kept, gone: `(n, K)` and `(r, K)`, columns of the weight within a block.
        maps: `(blocks, r, n)`, A of each block.
        blocks: how many the weight has.
        input_dim: the dimension of the weight that the columns lie on.
    """

    kept: Tensor
    gone: Tensor
    maps: Tensor
    blocks: int
    input_dim: int = 1

    def change(self, weight: Tensor) -> Tensor:
        """Return what is to be added to a weight `(O, D / blocks, ...)` or `(D, O, ...)`, or to its momentum."""
        if self.input_dim == 0:
            return replace(self, input_dim=1).change(weight.transpose(0, 1)).transpose(0, 1)
        change = torch.zeros_like(weight)
        kept, gone = (each.flatten().to(weight.device) for each in (self.kept, self.gone))
        parts = zip(weight.chunk(self.blocks), change.chunk(self.blocks), self.maps, strict=True)
        for part, target, matrix in parts:
            # (O, r * K, ...) -> (O, r, K, ...)
            from_gone = part.index_select(1, gone).reshape(len(part), *self.gone.shape, *part.shape[2:])
            moved = torch.tensordot(from_gone, matrix.to(from_gone), dims=([1], [0])).movedim(-1, 1)
            target.index_copy_(1, kept, moved.flatten(1, 2))
        return change


@dataclass(frozen=True, eq=False)
class Compensations:
    """What a cut adds to weights and offsets.

    Attributes:
        constants: by consuming weight, `(D,)`: what is left of the removed channels' means, zero for those that stay.
        merges: by consuming weight, one for each group that loses channels there.
    """

    constants: Mapping[str, Tensor]
    merges: Mapping[str, list[Merge]]


def compensations(graph: ChannelGraph, removed: Mapping[str, Tensor], moments: Moments) -> Compensations:
    """Return what to put where, before channels go.

    Args:
        graph: before the cut.
        removed: by group, the channels that go, `(r,)`.
        moments: of the consumers' inputs; without covariances their means alone are put into the offsets.
    """
    constants = removed_means(graph, removed, moments.means)
    merges: dict[str, list[Merge]] = {}
    for name, gone in removed.items():
        stays = torch.ones(graph[name].size, dtype=torch.bool)
        stays[gone] = False
        kept = stays.nonzero().flatten()
        for seen in graph[name].inputs:
            covariance = moments.covariances.get((seen.weight, name))
            if covariance is None:
                continue
            blocks = channel_blocks(graph, seen)
            assert blocks is not None
            maps = torch.stack([_trainable(each, kept, gone, moments.samples) for each in covariance])
            if seen.weight in constants:
                mean = moments.means[seen.weight]
                for positions, matrix in zip(blocks, maps, strict=True):
                    here, there = (positions[each].to(mean.device) for each in (kept, gone))
                    constants[seen.weight][there] = mean[there] - matrix.to(mean.device) @ mean[here]
            input_dim = _input_dim(graph, seen.weight)
            columns = blocks[0] % _tensor(graph, seen.weight).shape[input_dim]
            merge = Merge(columns[kept], columns[gone], maps, len(blocks), input_dim)
            merges.setdefault(seen.weight, []).append(merge)
    return Compensations(constants, merges)


def _trainable(covariance: Tensor, kept: Tensor, gone: Tensor, samples: int) -> Tensor:
    """Return A, `(r, n)`: the best one whose rows have at most the norm `MOST_GROWTH`, by their root mean square."""
    best = _prediction(covariance, kept, gone, samples)
    if _growth(best) <= MOST_GROWTH:
        return best
    c = covariance.double().cpu()
    values, vectors = torch.linalg.eigh(c[kept][:, kept])
    across = c[gone][:, kept] @ vectors  # (r, n)
    for part in _VARIANCE_FLOORS:
        solved = across / (values.clamp_min(0) + part * c.diagonal().max())
        if _growth(solved) <= MOST_GROWTH:
            found: Tensor = solved @ vectors.T
            return found
    return torch.zeros_like(best)


def _growth(coefficients: Tensor) -> float:
    """Return the root mean square of the rows' norms: what `W[:, R] A` has of the norm of `W[:, R]`, roughly."""
    return float(coefficients.square().sum(1).mean().sqrt()) if len(coefficients) else 0.0


def _prediction(covariance: Tensor, kept: Tensor, gone: Tensor, samples: int) -> Tensor:
    """Return A, `(r, n)`: the coefficients of what goes in what stays.

    The ridge is that of Hoerl, Kennard & Baldwin (1975), in units of each kept channel's deviation: `n s^2 / (N b^2)`
    with the variance s^2 that the prediction leaves, its coefficients b, and for N the samples, since the rows of one
    image say nearly the same. It is 0 where nothing is left, so that
    copies are predicted exactly, and large where the prediction is noise.
    """
    c = covariance.double().cpu()
    kk, rk, rr = c[kept][:, kept], c[gone][:, kept], c[gone, gone]
    scale = kk.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(kk / scale / scale.unsqueeze(1))
    across = (rk / scale) @ vectors  # (r, n)
    least = _RANK_TOLERANCE * len(kept)
    plain = torch.where(values > least, across / values.clamp_min(least), 0.0)
    left = (rr - (plain * across).sum(1)).clamp_min(0)
    strength = plain.square().sum(1)
    ridge = len(kept) * left / (max(samples, 1) * strength.clamp_min(torch.finfo(torch.float64).tiny))
    solved = torch.where(values > least, across / (values.clamp_min(least) + ridge.unsqueeze(1)), 0.0)
    coefficients: Tensor = (solved @ vectors.T) / scale
    return coefficients
