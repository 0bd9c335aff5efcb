"""The channel graph: what a trace returns, what criteria and budgets read, and what a cut narrows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from compressor.graph.axes import BoolArray
from compressor.graph.group import Extent, Frozen, Group, Offset, Term
from compressor.graph.recording import Recording
from compressor.graph.table import Table

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ChannelGraph:
    """Which channels of a model go together. Made by `compressor.trace`, narrowed by `compressor.cut`.

    Attributes:
        model: the traced model itself, not a copy.
        example_inputs: what the model was run on; a cut is checked on them.
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

    def adopt(self, fresh: ChannelGraph) -> list[str]:
        """Take over a new trace of the same model. Groups that are frozen stay so; writes the graph, not the model.

        Returns:
            Names of groups that the new trace does not have, or not at the same positions; they are frozen.
        """
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
        groups = table.groups([exact.get(name, True) for name in table.names])
        self.table = table
        self.recording = recording
        self.groups = tuple(group for group in groups if group.name in exact)


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
