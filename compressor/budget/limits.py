"""Limits: which groups may lose channels, and how many, said by patterns.

    Limits(keep=["conv1"], only=["layer[34].*"], sparsity={"layer4.*": 0.3})

A pattern is a shell pattern (`*`, `?`, `[34]`). It names a group by the group's own name, or by a tensor or module that
writes or follows the group's channels: `layer1.0.conv1`, `layer1.0.bn1.weight`, `layer1.*`. A layer that only reads the
channels does not name them: the pattern of a layer is about the channels that come out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from compressor.errors import InputError, RangeError, UnknownNameError

if TYPE_CHECKING:
    from compressor.graph import ChannelGraph, Group  # which import torch; the command line only reads patterns


@dataclass(frozen=True)
class Limits:
    """What a budget must respect, group by group.

    Attributes:
        keep: patterns of groups that stay whole.
        only: patterns of the groups that may lose channels; all of them if there is no pattern.
        sparsity: by pattern, the share of a group's own channels that goes, in `[0, 1)`, whatever the budget and the
            floor are. All other groups serve the budget.

    Raises:
        RangeError: a share outside `[0, 1)`.
    """

    keep: Sequence[str] = ()
    only: Sequence[str] = ()
    sparsity: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the shares."""
        for pattern, share in self.sparsity.items():
            if not 0 <= share < 1:
                raise RangeError(f"sparsity of {pattern!r}", share, "[0, 1)")

    def shares(self, graph: ChannelGraph) -> dict[str, float]:
        """Return what is settled before any score: by group name, the share that goes; 0 for a group that stays whole.

        Raises:
            UnknownNameError: a pattern that matches no group.
            InputError: patterns that contradict each other, or leave no group that may lose channels.
        """
        if not self:
            return {}
        names = graph.sizes().keys()
        kept, only = _matched(graph, "keep", self.keep), _matched(graph, "only", self.only)
        allowed = set().union(*only.values()) if only else set(names)
        for pattern, matched in kept.items():
            _require(matched & allowed, f"keep {pattern!r} has no effect: only leaves its groups whole anyway")
        whole = (names - allowed).union(*kept.values())
        _require(names - whole, "keep and only leave no group that may lose channels")
        return self._wanted(graph, whole, kept) | dict.fromkeys(whole, 0.0)

    def _wanted(self, graph: ChannelGraph, whole: set[str], kept: Mapping[str, set[str]]) -> dict[str, float]:
        """Return the share of every group that a pattern gives one, if the patterns agree."""
        wanted = _matched(graph, "sparsity", self.sparsity)
        shares = dict[str, float]()
        for name in graph.sizes():
            patterns = {self.sparsity[pattern]: pattern for pattern in _matching(name, wanted)}
            rivals = [f"sparsity {pattern}={share:g}" for share, pattern in patterns.items()]
            if patterns and name in whole:
                rivals += [f"keep {pattern}" for pattern in _matching(name, kept)] or ["only"]
            if len(rivals) > 1:
                raise InputError(f"{' and '.join(rivals)} contradict each other at group {name!r}: leave one out")
            shares |= dict.fromkeys([name] if patterns else [], next(iter(patterns), 0.0))
        return shares

    def __bool__(self) -> bool:
        """Return whether there is any pattern."""
        return bool(self.keep or self.only or self.sparsity)


def _matched(graph: ChannelGraph, option: str, patterns: Iterable[str]) -> dict[str, set[str]]:
    """Return by pattern the names of the groups that it matches."""
    found = {pattern: {each.name for each in graph.groups if _matches(pattern, each)} for pattern in patterns}
    for pattern, names in found.items():
        if not names:
            raise UnknownNameError(f"group for {option}", pattern, _known(graph), hint=_hint(graph, pattern))
    return found


def _matching(name: str, matched: Mapping[str, set[str]]) -> list[str]:
    """Return the patterns that match a group."""
    return [pattern for pattern, names in matched.items() if name in names]


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise InputError(f"{otherwise}: leave one of the patterns out")


def _matches(pattern: str, group: Group) -> bool:
    return any(fnmatchcase(name, pattern) for name in _names(group))


def _names(group: Group) -> list[str]:
    """Return what a pattern may call a group: its name, and the tensors and modules whose own channels these are."""
    tensors = [member.tensor for member in group.members if member.role != "consumer"]
    return list(dict.fromkeys([group.name, *(name for each in tensors for name in (each, each.rpartition(".")[0]))]))


def _known(graph: ChannelGraph) -> list[str]:
    return [name for group in graph.groups for name in _names(group) if name]


def _hint(graph: ChannelGraph, pattern: str) -> str:
    """Say why a pattern that does name something of the model matches no group."""
    frozen = [each for each in graph.frozen if _names_tensor(pattern, each.tensor)]
    readers = [each for each in graph.groups for member in each.members if _names_tensor(pattern, member.tensor)]
    if readers:
        return f"it only reads the channels of group {readers[0].name!r}"
    return f"{frozen[0].tensor!r} is frozen: {frozen[0].reason}" if frozen else ""


def _names_tensor(pattern: str, tensor: str) -> bool:
    return fnmatchcase(tensor, pattern) or fnmatchcase(tensor.rpartition(".")[0], pattern)
