"""Exclude channels per sample while training, and gather what the losses say to it.

Gates act where channels are *consumed*: a channel that no consumer sees is a channel removed, in every group, whatever
adds, concatenates or normalises on the way there.

Shape letters: B samples; C channels of a group; N channels of all gated groups, side by side; D positions along the
channel dimension of one consumer's input; K positions of one channel there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor._utils import Ranks
from compressor.errors import InputError, UnknownNameError
from compressor.graph import ChannelGraph, Group
from compressor.relevance.config import Exclusion
from compressor.relevance.gating import Gate, Workspace, in_backward, in_checkpoint, may_reuse_memory
from compressor.relevance.sample_rows import Layout, row_layouts, shared_out
from compressor.relevance.unexplained import RunningCovariances
from compressor.surgery import channel_blocks


def observable(group: Group) -> bool:
    """Return whether every consumer of the group is a module that can be watched, so that gates reach all of them."""
    consumers = {member.tensor for member in group.of_role("consumer")}
    seen = {each.weight for each in group.consumer_inputs}
    return bool(seen) and consumers <= seen


class Gates:
    """Multiplies the channels that consumers see by per-sample gates, and gathers the losses' gradients by gate.

    A gate of 1 leaves a channel alone, bit for bit; a gate of 0 excludes it: it becomes zero, its mean, or what the
    other channels of its group predict of it. Channels of other groups in the same
    input (behind a concatenation, say) are left alone. In evaluation mode nothing is gated.

    The running mean of every input is kept along the way: what a removed channel is replaced by, and what a cut folds
    into the next bias.

    Between forward and backward pass nothing more is kept than without gates: what a gated module would save of its
    input, it makes again from the input before the gates.

    Args:
        graph: the channel graph of the model.
        groups: names of the groups to gate; all that are `observable` by default.
        half_life: after how many forward passes an old mean counts half. May be changed later.
        track_every: one forward pass in so many is taken into the means, the first one in any case. May be changed.
        exclude: what a gate of 0 puts in place of a channel: "zero", its "mean", or "linear", what the other channels
            of its group predict. Where no bias or running mean behind the consumer could take the mean, a cut leaves
            nothing of it, and so does the gate: "mean" is zero there, and "linear" predicts about zero.

    Attributes:
        sizes: by group name, the number of its channels, in the order in which they stand side by side in `(B, N)`.
        unseen: by group name, why a pass did not show its channels sample by sample: that input was left alone.

    Raises:
        UnknownNameError: a group that is not in the graph.
        InputError: a group with a consumer that no module shows, or no group at all.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        groups: Collection[str] | None = None,
        half_life: float = 100.0,
        track_every: int = 1,
        exclude: Exclusion = "zero",
    ) -> None:
        names = [each.name for each in graph.groups if observable(each)] if groups is None else list(groups)
        chosen = [_named(graph, name) for name in names]
        _check(chosen)
        self.sizes = {group.name: group.size for group in chosen}
        self._graph = graph
        self.half_life = half_life
        self.track_every = track_every
        self.unseen: dict[str, str] = {}
        self._unknown: set[str] = set()
        self._passes = 0
        self._differ = False  # whether a pass was taken into the means since the ranks agreed on them
        self._workspace = Workspace()
        self._kept: ExitStack | None = None
        self._exclude: Exclusion = exclude
        self._sites = _sites(graph, chosen, with_covariances=exclude == "linear")

    def split(self, side_by_side: Tensor) -> dict[str, Tensor]:
        """Return the part of every group, `(..., C)` by name, of a tensor `(..., N)`."""
        return dict(zip(self.sizes, torch.split(side_by_side, list(self.sizes.values()), dim=-1), strict=True))

    @contextmanager
    def applied(self, gates: Tensor) -> Iterator[set[str]]:
        """Gate every training-mode forward pass inside the `with`; afterwards no hook is left, whatever happened.

        Only where the model runs under `torch.utils.checkpoint` hooks stay until `release`, or the next batch: what
        is run again in the backward pass must meet the same gates.

        Args:
            gates: `(B, N)`. Where they require gradients, `backward()` leaves in `gates.grad` the gradient of the loss
                by every sample's gates, summed over all places where a group is consumed.

        Yields:
            The names of the modules whose input was gated, filled while the model runs. An input that is not laid out
            as `(B, ...)` with the expected channels, or as several rows of each sample, is left alone, and its groups
            are `unseen`.
        """
        # NOTE: Column 0 is the gate of every position that belongs to no gated group.
        padded = torch.cat([gates.new_ones(len(gates), 1), gates], dim=1)
        gated_modules: set[str] = set()
        tracked = self._passes % self.track_every == 0
        self.release()
        batch = _GatedBatch(padded, tracked, gated_modules)
        with ExitStack() as hooks:
            for site in self._sites.values():
                before, after = self._hooks(site, batch)
                hooks.callback(site.module.register_forward_pre_hook(before).remove)
                # always_call: a module that fails must not leave its saved-tensor hooks on for the rest of the program.
                hooks.callback(site.module.register_forward_hook(after, always_call=True).remove)
            yield gated_modules
            batch.is_open = False
            if batch.is_checkpointed:
                self._kept = hooks.pop_all()
        # A `with` in which the model did not run, or only in evaluation mode, is no pass.
        self._passes += bool(gated_modules)

    def find_samples(self) -> bool:
        """Look, once for each input that is not laid out as a batch, whether its rows belong to samples all the same.

        Returns:
            Whether that holds for some; then nothing is `unseen` until the next pass.
        """
        unknown, self._unknown = self._unknown, set()
        found = row_layouts(self._graph.model, self._graph.example_inputs, unknown) if unknown else {}
        for name, layout in found.items():
            self._sites[name].layout = layout
        if any(found.values()):
            self.unseen = {}
        return any(found.values())

    @property
    def awaits_backward(self) -> bool:
        """Whether a batch ran under `torch.utils.checkpoint` and was not released."""
        return self._kept is not None

    def release(self) -> None:
        """Take away the hooks that stayed for a backward pass."""
        if self._kept:
            self._kept.close()
        self._kept = None

    def _hooks(self, site: _Site, batch: _GatedBatch) -> tuple[Any, Any]:
        """Return what runs before and after a site's module."""
        saving = ExitStack()

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # Evaluation in the middle of a `with` measures the model itself, not the model with channels missing.
            is_recomputed = in_backward()
            if not self._graph.model.training or not (batch.is_open or is_recomputed):
                return None
            if problem := site.problem(inputs, len(batch.padded)):
                if site.layout is None:
                    self._unknown.add(site.name)
                self.unseen |= dict.fromkeys(site.positions, problem)
                return None
            h = inputs[0]
            batch.gated_modules.add(site.name)
            if not is_recomputed and (batch.tracked or not site.count):
                site.track(h.detach(), 0.5 ** (self.track_every / self.half_life))
                self._differ = True
            rows = shared_out(batch.padded.index_select(1, site.columns(h)), site.layout or "", len(h))
            mean = site.mean() if site.is_shifted and self._exclude != "zero" else None
            unexplained = None
            if site.covariances:
                unexplained = partial(site.covariances.unexplained, dim=site.dim, mean=mean)
            gate = Gate(rows, mean, site.dim, self._workspace, may_reuse_memory(module), unexplained)
            if is_recomputed or in_checkpoint():
                batch.is_checkpointed = True
                return (gate.on_recomputed(h), *inputs[1:])
            return (saving.enter_context(gate.on(h)), *inputs[1:])

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            saving.close()

        return before, after

    def means(self) -> dict[str, Tensor]:
        """Return the running mean of every consumer's input, `(D,)` by the name of the consuming weight.

        Weights whose module has not run yet are left out.
        """
        return {weight: site.mean() for site in self._sites.values() if site.count for weight in site.weights}

    def agree(self, ranks: Ranks) -> None:
        """Put the mean over the ranks in place of what this one saw of the inputs; call it after every step."""
        if ranks.size == 1 or not self._differ:
            return
        seen = {name: site for name, site in self._sites.items() if site.count}
        totals = ranks.mean({name: site.total for name, site in seen.items()})
        for name, site in seen.items():
            site.total = totals[name]
            if site.covariances:
                site.covariances.products = ranks.mean(site.covariances.products)
        self._differ = False

    def narrowed(self, keep: Mapping[str, Tensor], graph: ChannelGraph) -> Gates:
        """Return new gates for the model after a cut, with the means of the channels that stayed.

        Args:
            keep: by group name, the indices that stayed, `(n,)`.
            graph: the channel graph after the cut.
        """
        after = Gates(graph, half_life=self.half_life, track_every=self.track_every, exclude=self._exclude)
        after._passes = self._passes
        for name, site in after._sites.items():
            if name in self._sites:
                site.total = self._sites[name].kept(keep)
                site.count = self._sites[name].count
                site.layout = self._sites[name].layout
                before = self._sites[name].covariances
                if site.covariances and before:
                    site.covariances.narrow_from(before, keep)
        return after

    def state_dict(self) -> dict[str, Any]:
        """Return the running means and how many passes there were, as plain tensors and numbers."""
        sites = {name: site.state_dict() for name, site in self._sites.items()}
        return {"sites": sites, "passes": self._passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the means of `state_dict()`."""
        self._passes = int(state["passes"])
        for name, site in self._sites.items():
            site.load_state_dict(state["sites"][name])


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


@dataclass
class _GatedBatch:
    """One batch that is gated.

    Attributes:
        padded: `(B, 1 + N)`, the gates behind a column of ones.
        tracked: whether means are taken of it.
        gated_modules: names of modules whose input was gated.
        is_open: whether its forward pass is still running.
        is_checkpointed: whether a part of it will be run again.
    """

    padded: Tensor
    tracked: bool
    gated_modules: set[str]
    is_open: bool = True
    is_checkpointed: bool = False


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
        is_shifted: whether a bias or running mean behind the module can take what a removed channel is on average.
        total, count: decaying sums of the input's means `(D,)`, and of ones.
        covariances: of its channels, where they are asked for.
        layout: how its rows belong to samples, where there are more rows than samples; None before that was looked at.
    """

    module: nn.Module
    name: str
    dim: int
    weights: list[str] = field(default_factory=list)
    positions: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    is_shifted: bool = False
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    count: float = 0.0
    covariances: RunningCovariances | None = None
    layout: Layout | None = None
    _columns: Tensor | None = None

    def problem(self, inputs: tuple[Any, ...], batch: int) -> str:
        """Return why the module's first positional input cannot be gated; nothing where it is laid out as needed."""
        h = inputs[0] if inputs else None
        least = 1 + max(int(positions.max()) for positions in self.positions.values())
        times, rest = divmod(len(h), batch) if isinstance(h, Tensor) and h.dim() else (0, 1)
        is_batch = times > 0 and rest == 0 and (times == 1 or bool(self.layout))
        if not isinstance(h, Tensor) or h.dim() <= -self.dim or not is_batch or h.size(self.dim) < least:
            came = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else f"{type(h).__name__} instead of a tensor"
            return (
                f"the input of module {self.name!r} cannot be gated: its first positional argument is {came}, and a "
                f"batch of {batch} samples first, with at least {least} channels on dimension {self.dim}, is needed"
            )
        return ""

    def columns(self, h: Tensor) -> Tensor:
        """Return the column of the gate of every position, `(D,)`."""
        if self._columns is None or len(self._columns) != h.size(self.dim) or self._columns.device != h.device:
            columns = torch.zeros(h.size(self.dim), dtype=torch.int64)  # column 0: the constant 1
            for name, positions in self.positions.items():
                columns[positions] = torch.arange(len(positions)).unsqueeze(1) + self.starts[name]
            self._columns = columns.to(h.device)
        return self._columns

    def track(self, h: Tensor, decay: float) -> None:
        """Take one more input into the running mean. An input of another width than before starts it anew."""
        others = [dim for dim in range(h.dim()) if dim != h.dim() + self.dim]
        # At least float32: a decaying sum of half-precision means stops growing after some hundred terms.
        mean = h.mean(others, dtype=torch.promote_types(h.dtype, torch.float32))
        if len(self.total) != len(mean):
            self.total = torch.zeros_like(mean)
            self.count = 0.0
        self.total = self.total.to(mean) * decay + mean
        self.count = self.count * decay + 1
        if self.covariances:
            self.covariances.add(h.movedim(self.dim, -1).flatten(0, -2), decay)

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the input, as plain tensors and numbers."""
        state: dict[str, Any] = {"total": self.total, "count": self.count, "layout": self.layout}
        if self.covariances:
            state |= {"products": dict(self.covariances.products), "rows": self.covariances.rows}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict()` knew."""
        self.total, self.count, self.layout = state["total"], state["count"], state["layout"]
        if self.covariances:
            self.covariances.products = dict(state["products"])
            self.covariances.rows, self.covariances.count = state["rows"], state["count"]

    def mean(self) -> Tensor:
        """Return the running mean, `(D,)`."""
        return self.total / self.count

    def kept(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Return `total` without the positions of the channels that are not kept."""
        stays = torch.ones(len(self.total), dtype=torch.bool)
        for name, positions in self.positions.items():
            if name in keep and len(stays):
                stays[positions] = False
                stays[positions[keep[name].cpu()]] = True
        return self.total[stays.to(self.total.device)]


def _sites(graph: ChannelGraph, groups: Sequence[Group], *, with_covariances: bool) -> dict[str, _Site]:
    """Collect where the groups are consumed, by module name; a site may hold several groups, a group several sites."""
    sites: dict[str, _Site] = {}
    start = 1
    for group in groups:
        for each in group.consumer_inputs:
            site = sites.setdefault(each.module, _Site(graph.model.get_submodule(each.module), each.module, each.dim))
            site.positions[group.name] = each.positions
            site.starts[group.name] = start
            site.weights += [each.weight] if each.weight not in site.weights else []
            site.is_shifted |= each.weight in graph.offsets
            if with_covariances:
                site.covariances = site.covariances or RunningCovariances({}, centred=site.is_shifted)
                site.covariances.blocks[group.name] = channel_blocks(graph, each) or [each.positions]
        start += group.size
    return sites


def _named(graph: ChannelGraph, name: str) -> Group:
    if name not in graph.sizes():
        raise UnknownNameError("group", name, graph.sizes(), hint="`graph.groups` lists them")
    return graph[name]
