"""The channel graph: what a trace returns, what criteria and budgets read, and what a cut narrows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.graph.axes import BoolArray, Unlabeled
from compressor.graph.group import Extent, Frozen, Group, Offset, Term
from compressor.graph.recording import Recording, Slot
from compressor.graph.table import Table

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ChannelGraph:
    """Which channels of a model go together. Made by `compressor.trace`, narrowed by `compressor.cut`.

    Attributes:
        model: the traced model itself, not a copy.
        example_inputs: what the model was run on; a cut is checked on them.
        blocks: names of groups that are blocks of a view, heads of attention say.
        coupled: by group that consists of several, their names, each with how many of its channels make one.
        outputs: takes what the model returns and returns what counts of it; None counts everything.
        groups: the groups that can be cut, in the order in which the model uses them.
        frozen: dimensions that cannot be cut, each with its reason.
        params, macs: terms whose sum is the number of parameters, and of multiply-adds for the example inputs.
        offsets: by weight name, where the mean of a removed input channel can be folded.
        notes: what the user should know: a fall-back to real tensors, an operation without a rule, what froze later.
        table: all members of all groups as arrays; a graph made by hand, which nobody cuts, has an empty one.
        recording: every operation of the trace, against which a cut is verified.
    """

    model: nn.Module
    example_inputs: Any
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    params: tuple[Term, ...] = ()
    macs: tuple[Term, ...] = ()
    offsets: Mapping[str, Offset] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    table: Table = field(default_factory=Table.empty, repr=False)
    recording: Recording = field(default_factory=Recording.empty, repr=False)
    blocks: tuple[str, ...] = ()
    coupled: dict[str, dict[str, int]] = field(default_factory=dict)
    outputs: Callable[[Any], Any] | None = None
    _by_name: tuple[Sequence[Group], dict[str, Group]] = field(default=((), {}), init=False, repr=False)

    def __getitem__(self, name: str) -> Group:
        """Return the group called `name`; KeyError if there is none."""
        # `groups` is public and may be assigned, so the dict remembers of which tuple it was made.
        if self._by_name[0] is not self.groups:
            self._by_name = (self.groups, {group.name: group for group in self.groups})
        return self._by_name[1][name]

    def sizes(self) -> dict[str, int]:
        """Return the number of channels of every group, by name."""
        return {group.name: group.size for group in self.groups}

    def extent(self, slot: Slot, size: int) -> Extent:
        """Return what an axis of the recording comes to after any cut.

        Args:
            slot: of the recording.
            size: of the axis, where it has no labels.
        """
        if isinstance(slot, Unlabeled):
            return Extent(size)
        counts = np.bincount(self.recording.classes_in(slot), minlength=len(self.recording.prunable))
        parts = {name: int(counts[classes[0]]) for name, classes in self.recording.channels.items() if len(classes)}
        sizes = self.sizes()
        there = {
            name: sum(parts.get(part, 0) * share for part, share in self.coupled.get(name, {name: 1}).items())
            for name in sizes
        }
        per_channel = {name: times for name, times in there.items() if times}
        fixed = int(counts.sum()) - sum(times * sizes[name] for name, times in per_channel.items())
        return Extent(fixed, per_channel)

    def freeze(self, names: Collection[str], reason: str) -> None:
        """Take groups out of the graph: their channels stay, for that reason. Writes the graph, not the model."""
        sizes = {name: size for name, size in self.sizes().items() if name in names}
        if not sizes:
            return
        note = f"group {', '.join(sizes)} stays as it is: {reason}"
        logger.info(note)
        self.notes += (note,)
        members = [member for group in self.groups if group.name in sizes for member in group.members]
        self.frozen += tuple(Frozen(each.tensor, each.dim, reason, each.positions.numel()) for each in members)
        self.groups = tuple(group for group in self.groups if group.name not in sizes)
        self.params = tuple(_with_constant_sizes(term, sizes) for term in self.params)
        self.macs = tuple(_with_constant_sizes(term, sizes) for term in self.macs)

    def note(self, lines: Iterable[str]) -> None:
        """Add what the user should know; writes the graph, not the model."""
        for line in lines:
            logger.info(line)
            self.notes += (line,)

    # -- groups that are cut in proportion

    def couple(self, names: Sequence[str]) -> str:
        """Make one group of several, in which a channel is an equal share of each; writes the graph, not the model.

        Args:
            names: two groups or more, whose sizes have a common divisor; its channels are as many.

        Returns:
            The name of the new group, which is that of the first one.
        """
        sizes = self.sizes()
        count = math.gcd(*(sizes[name] for name in names))
        shares = {name: sizes[name] // count for name in names}
        self.coupled[names[0]] = shares
        joined = _joined(names[0], [self[name] for name in names], shares)
        others = set(names[1:])
        self.groups = tuple(
            joined if each.name == names[0] else each for each in self.groups if each.name not in others
        )
        self.params, self.macs = (
            tuple(_with_shares(term, names[0], shares) for term in terms) for terms in (self.params, self.macs)
        )
        return names[0]

    def uncoupled(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what stays of the groups that coupled ones consist of, by their own names."""
        found: dict[str, Tensor] = {}
        for name, kept in keep.items():
            for each, share in self.coupled.get(name, {name: 1}).items():
                found[each] = (kept.unsqueeze(1) * share + torch.arange(share)).flatten()
        return found

    def coupled_names(self, names: Iterable[str]) -> list[str]:
        """Return the groups that cover these, which may be parts of coupled ones."""
        part_of = {part: name for name, parts in self.coupled.items() for part in parts}
        return list(dict.fromkeys(part_of.get(name, name) for name in names))

    def wider_groups_beside(self, name: str) -> list[str]:
        """Return the groups that stand in the modules that split this one out of a view, and have a multiple of it."""
        recording, sizes = self.recording, self.sizes()
        modules = recording.modules_of(name)
        beside = recording.groups_within(modules)
        return [
            each for each in beside if each in sizes and sizes[each] > sizes[name] and not sizes[each] % sizes[name]
        ]

    def snapshot(self) -> dict[str, Any]:
        """Return what `couple` writes, for `restore`."""
        return {"groups": self.groups, "params": self.params, "macs": self.macs, "coupled": dict(self.coupled)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Put back what a snapshot holds; writes the graph, not the model."""
        vars(self).update(snapshot)

    def adopt(self, fresh: ChannelGraph) -> list[str]:
        """Take over a new trace of the same model. Groups that are frozen stay so; writes the graph, not the model.

        Returns:
            Names of groups that the new trace does not have, or not at the same positions; they are frozen.
        """
        for parts in self.coupled.values():
            if parts.keys() <= fresh.sizes().keys() and all(
                not fresh.sizes()[part] % share for part, share in parts.items()
            ):
                fresh.couple(list(parts))
        common = {each.name for each in self.groups if each.name in fresh.sizes() and _is_same(each, fresh[each.name])}
        missing = [name for name in self.sizes() if name not in common]
        self.freeze(missing, "the model, traced anew, ties these channels otherwise")
        fresh.freeze(fresh.sizes().keys() - common, "frozen before the model was traced anew")
        self.groups = fresh.groups
        self.params = fresh.params
        self.macs = fresh.macs
        self.offsets = fresh.offsets
        self.table = fresh.table
        self.recording = fresh.recording
        self.coupled = fresh.coupled
        return missing

    def narrow(self, removed: BoolArray, recording: Recording) -> None:
        """Describe the model after a cut. Writes the graph, not the model, which must be cut and verified already.

        Args:
            removed: for every channel, counted through all groups, whether it was removed, as `table.removed` returns.
            recording: `self.recording` without the removed channels, against which the cut model was verified.
        """
        # Table, recording and groups change together or not at all: the costs are formulas in the groups' sizes, and
        # hold after every cut. Frozen groups keep their rows in the table, because positions beside them shift.
        exact = {group.name: group.exact for group in self.groups}
        table = self.table.without(removed)
        parts = {group.name: group for group in table.groups([exact.get(name, True) for name in table.names])}
        for name, shares in ((name, each) for name, each in self.coupled.items() if name in exact):
            parts[name] = replace(_joined(name, [parts[each] for each in shares], shares), exact=exact.get(name, True))
        self.table = table
        self.recording = recording
        self.groups = tuple(parts[name] for name in exact)


def _joined(name: str, groups: Sequence[Group], shares: Mapping[str, int]) -> Group:
    """Return the group in which one channel is `shares[name]` successive channels of each group."""
    sizes = {group.size // shares[group.name] for group in groups}
    (size,) = sizes
    return Group(
        name,
        size,
        tuple(
            replace(member, positions=member.positions.reshape(size, -1))
            for group in groups
            for member in group.members
        ),
        tuple(replace(seen, positions=seen.positions.reshape(size, -1)) for group in groups for seen in group.inputs),
        all(group.exact for group in groups),
    )


def _with_shares(term: Term, name: str, shares: Mapping[str, int]) -> Term:
    """Return a term in the channels of the coupled group instead of those of its parts."""
    extents = []
    for extent in term.extents:
        together = sum(times * shares[part] for part, times in extent.per_channel.items() if part in shares)
        others = {part: times for part, times in extent.per_channel.items() if part not in shares}
        extents.append(Extent(extent.fixed, {**others, name: together} if together else others))
    return Term(term.constant, tuple(extents))


def _is_same(first: Group, second: Group) -> bool:
    """Return whether two groups live at the same positions of the same tensors."""
    if (first.size, len(first.members)) != (second.size, len(second.members)):
        return False
    pairs = zip(first.members, second.members, strict=True)
    return all((a.tensor, a.dim) == (b.tensor, b.dim) and a.positions.equal(b.positions) for a, b in pairs)


def _with_constant_sizes(term: Term, sizes: Mapping[str, int]) -> Term:
    """Return a term in which the channels of some groups are a fixed number."""
    if not any(name in sizes for extent in term.extents for name in extent.per_channel):
        return term
    extents = []
    for extent in term.extents:
        fixed = sum(times * sizes[name] for name, times in extent.per_channel.items() if name in sizes)
        variable = {name: times for name, times in extent.per_channel.items() if name not in sizes}
        extents.append(Extent(extent.fixed + fixed, variable))
    return Term(term.constant, tuple(extents))
