"""What is known of the inputs of all consumers: means, and covariances of the channels of each group.

    z = [1, 2] in one pixel, [2, 4] in another: mean [1.5, 3], covariance [[0.25, 0.5], [0.5, 1]]

Where no bias or running mean behind a consumer can take a constant, second moments about zero stand for covariances.
Consumers of which neither can be taken are named in the graph's notes.

Shape letters: D positions along the channel dimension of a consumer's input; C channels of a group; K positions that
one channel holds along D; N rows, one for each sample and place of the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.graph import ChannelGraph, ConsumerInput, Group, is_torch_module, owner
from compressor.surgery.compensation import require_finite, watch_inputs

_BY_MEAN, _BY_NOTHING = "compensated by the mean alone", "not compensated"  # begin notes


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
    weight = consumer_weight(graph, seen.weight)
    if weight.dim() < 2:
        return None
    if weight_input_dim(graph, seen.weight) == 0:
        return [seen.positions] if getattr(module, "groups", 1) == 1 else None
    width = weight.shape[1]  # of one block
    block = seen.positions // width
    if not (block == block[:1]).all():
        return None
    return [seen.positions[:, block[0] == index] for index in sorted(set(block[0].tolist()))]


def weight_input_dim(graph: ChannelGraph, weight: str) -> int:
    """Return the dimension of a weight that its input's channels lie on."""
    if offset := graph.offsets.get(weight):
        return offset.input_dim
    return 0 if isinstance(graph.model.get_submodule(owner(weight)[0]), nn.modules.conv._ConvTransposeNd) else 1


def consumer_weight(graph: ChannelGraph, name: str) -> Tensor:
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
