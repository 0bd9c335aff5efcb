"""Exclude channels without cutting them: for good, in the weights (`silence`), or per sample while training (`Gates`).

Both act where channels are *consumed*: a channel that no consumer sees is a channel removed, in every group, whatever
adds, concatenates or normalises on the way there.

Shape letters: B samples; C channels of a group; N channels of all gated groups, side by side; D positions along the
channel dimension of one consumer's input; K positions of one channel there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compressor.errors import InputError, RangeError, UnknownNameError
from compressor.graph.group import ChannelGraph, ConsumerInput, Group


@torch.no_grad()
def silence(graph: ChannelGraph, channels: Mapping[str, Tensor | Sequence[int]]) -> None:
    """Write zeros into the consumers' weights, so that the given channels contribute nothing; writes the model.

    For exact groups the outputs are then those of the model with the same channels cut.

    Args:
        graph: the channel graph of the model.
        channels: by group name, the indices to silence, `(n,)`, each in `[0, C)`.

    Raises:
        UnknownNameError: a group that is not in the graph. Nothing is written.
        InputError: a mask instead of indices. Nothing is written.
        RangeError: an index outside `[0, C)`. Nothing is written.
    """
    chosen = {name: _channels(graph, name, indices) for name, indices in channels.items()}
    tensors = dict(graph.model.named_parameters())
    for name, indices in chosen.items():
        for member in graph[name].of_role("consumer"):
            positions = member.positions[indices].flatten()
            tensors[member.tensor].index_fill_(member.dim, positions.to(tensors[member.tensor].device), 0)


def _channels(graph: ChannelGraph, name: str, indices: Tensor | Sequence[int]) -> Tensor:
    size = _group(graph, name).size
    chosen = torch.as_tensor(indices).cpu()
    if chosen.dtype == torch.bool:
        raise InputError(f"channels of group {name!r} came as a mask: give their indices, mask.nonzero().flatten()")
    chosen = chosen.long()
    for index in chosen[(chosen < 0) | (chosen >= size)].tolist():
        raise RangeError(f"channel of group {name!r}", index, f"[0, {size - 1}]")
    return chosen


def _group(graph: ChannelGraph, name: str) -> Group:
    if name not in graph.sizes():
        raise UnknownNameError("group", name, graph.sizes(), hint="`graph.groups` lists them")
    return graph[name]


def observable(group: Group) -> bool:
    """Tell whether every consumer of the group is a module that can be watched, so that gates reach all of them."""
    consumers = {member.tensor for member in group.of_role("consumer")}
    return bool(consumers) and consumers == {seen.weight for seen in _consuming(group)}


def _consuming(group: Group) -> list[ConsumerInput]:
    """Give the inputs of consumers alone. A depthwise convolution hands its channels on: they would be gated twice."""
    consumers = {member.tensor for member in group.of_role("consumer")}
    return [seen for seen in group.inputs if seen.weight in consumers]


class Gates:
    """Multiplies the channels that consumers see by per-sample gates, and gathers the losses' gradients by gate.

    A gate of 1 leaves a channel alone, bit for bit; a gate of 0 excludes it. Channels of other groups in the same
    input (behind a concatenation, say) are left alone. In evaluation mode nothing is gated.

    The running mean of every input is kept along the way: what a removed channel is replaced by, and what a cut folds
    into the next bias.

    Args:
        graph: the channel graph of the model.
        groups: names of the groups to gate; all that are `observable` by default.
        half_life: after how many forward passes an old mean counts half.

    Attributes:
        sizes: by group name, the number of its channels, in the order in which they stand side by side in `(B, N)`.

    Raises:
        UnknownNameError: a group that is not in the graph.
        InputError: a group with a consumer that no module shows, or no group at all.
    """

    def __init__(self, graph: ChannelGraph, groups: Collection[str] | None = None, half_life: float = 100.0) -> None:
        names = [each.name for each in graph.groups if observable(each)] if groups is None else list(groups)
        chosen = [_group(graph, name) for name in names]
        _check(chosen)
        self.sizes = {group.name: group.size for group in chosen}
        self._graph, self._half_life = graph, half_life
        self._sites = _sites(graph.model, chosen)

    def split(self, side_by_side: Tensor) -> dict[str, Tensor]:
        """Give the part of every group, `(..., C)` by name, of a tensor `(..., N)`."""
        return dict(zip(self.sizes, torch.split(side_by_side, list(self.sizes.values()), dim=-1), strict=True))

    @contextmanager
    def applied(self, gates: Tensor, towards_mean: bool = False) -> Iterator[set[str]]:
        """Gate every training-mode forward pass inside the `with`; afterwards no hook is left, whatever happened.

        Args:
            gates: `(B, N)`. Where they require gradients, `backward()` leaves in `gates.grad` the gradient of the loss
                by every sample's gates, summed over all places where a group is consumed.
            towards_mean: `h <- mean + gate * (h - mean)` with the running mean of that input, instead of
                `h <- gate * h`.

        Yields:
            The names of the modules whose input was gated, filled while the model runs.

        Raises:
            InputError: while the model runs, if an input is not laid out as `(B, ...)` with the expected channels.
        """
        # NOTE: Column 0 is the gate of every position that belongs to no gated group.
        padded = torch.cat([gates.new_ones(len(gates), 1), gates], dim=1)
        reached: set[str] = set()
        with ExitStack() as hooks:
            for site in self._sites.values():
                hook = self._hook(site, padded, towards_mean, reached)
                hooks.callback(site.module.register_forward_pre_hook(hook).remove)
            yield reached

    def _hook(self, site: _Site, padded: Tensor, towards_mean: bool, reached: set[str]) -> Any:
        def gate(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self._graph.model.training:
                return None
            h = site.checked(inputs, len(padded))
            reached.add(site.name)
            site.track(h.detach(), 0.5 ** (1 / self._half_life))
            rows = padded.index_select(1, site.columns(h))
            mean = site.mean() if towards_mean else None
            return (_Gated.apply(h, rows, mean, site.dim), *inputs[1:])

        return gate

    def means(self) -> dict[str, Tensor]:
        """Give the running mean of every consumer's input, `(D,)` by the name of the consuming weight.

        Weights whose module has not run yet are left out.
        """
        return {weight: site.mean() for site in self._sites.values() if site.count for weight in site.weights}

    def narrowed(self, keep: Mapping[str, Tensor], graph: ChannelGraph) -> Gates:
        """Give the gates of the model after a cut, with the means of the channels that stayed.

        Args:
            keep: by group name, the indices that stayed, `(n,)`.
            graph: the channel graph after the cut.
        """
        after = Gates(graph, half_life=self._half_life)
        for name, site in after._sites.items():
            if name in self._sites:
                site.total, site.count = self._sites[name].kept(keep), self._sites[name].count
        return after

    def state_dict(self) -> dict[str, Any]:
        """Give the running means as plain tensors and numbers, by module name."""
        return {name: {"total": site.total, "count": site.count} for name, site in self._sites.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the means of `state_dict()`."""
        for name, site in self._sites.items():
            site.total, site.count = state[name]["total"], state[name]["count"]


def _check(groups: Sequence[Group]) -> None:
    for group in groups:
        if not observable(group):
            weights = sorted({member.tensor for member in group.of_role("consumer")}) or ["none"]
            raise InputError(
                f"group {group.name!r} cannot be watched: not every consumer ({', '.join(weights)}) is a module whose "
                "input shows its channels; score it by its weights instead (criterion l1, say)"
            )
    if not groups:
        raise InputError("no group to watch: no consumer shows its channels at its input; use another criterion (l1)")


# -- where channels are consumed


@dataclass(eq=False)
class _Site:
    """The first input of one module: which of its positions are gated by what, and its running mean.

    Attributes:
        module, name: the consumer.
        dim: the channel dimension of the input, negative.
        weights: names of the module's weights that consume it.
        positions: `(C, K)` by group name.
        starts: by group name, the column of its first channel (column 0 is the constant 1).
        total, count: decaying sums of the input's means `(D,)`, and of ones.
    """

    module: nn.Module
    name: str
    dim: int
    weights: list[str] = field(default_factory=list)
    positions: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    count: float = 0.0
    _columns: Tensor | None = None

    def checked(self, inputs: tuple[Any, ...], batch: int) -> Tensor:
        """Give the module's first positional input, if it is laid out as the gates need it."""
        h = inputs[0] if inputs else None
        least = 1 + max(int(positions.max()) for positions in self.positions.values())
        if not isinstance(h, Tensor) or h.dim() <= -self.dim or len(h) != batch or h.size(self.dim) < least:
            came = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else f"{type(h).__name__} instead of a tensor"
            raise InputError(
                f"the input of module {self.name!r} cannot be gated: its first positional argument is {came}, and a "
                f"batch of {batch} samples first, with at least {least} channels on dimension {self.dim}, is needed; "
                f"leave out its groups: {', '.join(self.positions)}"
            )
        return h

    def columns(self, h: Tensor) -> Tensor:
        """Give the column of the gate of every position, `(D,)`."""
        if self._columns is None or len(self._columns) != h.size(self.dim) or self._columns.device != h.device:
            columns = torch.zeros(h.size(self.dim), dtype=torch.int64)
            for name, positions in self.positions.items():
                columns[positions] = torch.arange(len(positions)).unsqueeze(1) + self.starts[name]
            self._columns = columns.to(h.device)
        return self._columns

    def track(self, h: Tensor, decay: float) -> None:
        """Take one more input into the running mean. An input of another width than before starts it anew."""
        others = [dim for dim in range(h.dim()) if dim != h.dim() + self.dim]
        mean = h.mean(others, dtype=torch.promote_types(h.dtype, torch.float32))
        if len(self.total) != len(mean):
            self.total, self.count = torch.zeros_like(mean), 0.0
        self.total = self.total.to(mean) * decay + mean
        self.count = self.count * decay + 1

    def mean(self) -> Tensor:
        """Give the running mean, `(D,)`."""
        return self.total / self.count

    def kept(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Give `total` without the positions of the channels that are not kept."""
        stays = torch.ones(len(self.total), dtype=torch.bool)
        for name, positions in self.positions.items():
            if name in keep and len(stays):
                stays[positions] = False
                stays[positions[keep[name].cpu()]] = True
        return self.total[stays.to(self.total.device)]


def _sites(model: nn.Module, groups: Sequence[Group]) -> dict[str, _Site]:
    """Collect where the groups are consumed, by module name; a site may hold several groups, a group several sites."""
    sites: dict[str, _Site] = {}
    start = 1
    for group in groups:
        for seen in _consuming(group):
            site = sites.setdefault(seen.module, _Site(model.get_submodule(seen.module), seen.module, seen.dim))
            site.positions[group.name], site.starts[group.name] = seen.positions, start
            site.weights += [seen.weight] if seen.weight not in site.weights else []
        start += group.size
    return sites


# -- the arithmetic


class _Gated(torch.autograd.Function):
    """`gate * h`, or `mean + gate * (h - mean)`, with the gradient by every gate in the same backward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, rows: Tensor, mean: Tensor | None, dim: int) -> Tensor:
        gate = _along(rows, h, dim)
        centre = None if mean is None else _along(mean, h, dim)
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, rows, mean)
        ctx.dim = dim
        return h * gate if centre is None else torch.lerp(centre, h, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, rows, mean = ctx.saved_tensors
        by_h = gradient * _along(rows, gradient, ctx.dim) if ctx.needs_input_grad[0] else None
        by_gate = None
        if h is not None:
            centred = h if mean is None else h - _along(mean, h, ctx.dim)
            by_gate = _summed(centred * gradient, ctx.dim, rows.dtype)
        return by_h, by_gate, None, None


def _along(values: Tensor, h: Tensor, dim: int) -> Tensor:
    """View values `(B, D)` or `(D,)` so that they broadcast against `h`, in its precision."""
    shape = [1] * h.dim()
    shape[0], shape[dim] = (len(values) if values.dim() == 2 else 1), values.shape[-1]
    return values.to(h.dtype).view(shape)


def _summed(product: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sum over everything but samples and channels: `(B, D)`."""
    others = [each for each in range(1, product.dim()) if each != product.dim() + dim]
    return product.sum(others, dtype=dtype) if others else product.to(dtype)
