"""The vocabulary of the channel graph: what a channel, a group and a member are.

A *channel* is the smallest thing that can be cut. A *group* is a set of `C` channels that live on the same tensor
dimensions; each such dimension is a *member* of the group. Read this file first: everything else scores groups,
chooses among their channels, or cuts them.

Shape letters: C channels of a group; K positions that one channel holds along a dimension; F values of one channel.
"""

# A worked example: conv a (3 -> 4, no bias), then a flatten of 2 x 2, then Linear b (16 -> 5). One group, C = 4:
#
#   Group("a", size=4)
#     Member("a.weight", dim=0, role="producer", positions=[[0], [1], [2], [3]])                       K = 1
#     Member("b.weight", dim=1, role="consumer", positions=[[0 1 2 3], [4 5 6 7], [8 ...], [12 ...]])  K = 4
#
# Removing channel 1 takes row 1 of a.weight and columns 4 to 7 of b.weight.

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Role = Literal["producer", "consumer", "follower"]


@dataclass(frozen=True, eq=False)
class Member:
    """One tensor dimension on which a group lives.

    Attributes:
        tensor: name of a parameter or buffer, as in `model.state_dict()`.
        dim: the dimension of that tensor.
        positions: `(C, K)` int64; row `c` lists the indices along `dim` that belong to channel `c`. A plain convolution
            has `K = 1`, a Linear behind a flatten `K = H * W`, a concatenation an offset.
        role: "producer" on the output side of a weight, "consumer" on its input side, "follower" for everything that
            scales or shifts channel by channel (BatchNorm, biases, depthwise kernels).
    """

    tensor: str
    dim: int
    positions: Tensor
    role: Role

    def rows(self, tensor: Tensor) -> Tensor:
        """Return what each channel holds of `tensor`, one channel a row: `(C, K * numel / size(dim))`."""
        lines = tensor.movedim(self.dim, 0).flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
        if torch.equal(self.positions.flatten(), torch.arange(len(lines))):
            return lines.reshape(len(self.positions), -1)  # everything in order: nothing to pick, nothing to copy
        return lines[self.positions.to(tensor.device)].flatten(1)


@dataclass(frozen=True, eq=False)
class ConsumerInput:
    """Where a consumer's module sees the channels of a group: the place to exclude a channel or to watch it.

    Attributes:
        weight: name of the consuming weight; the module that owns it is `module`.
        dim: channel dimension of the module's first input tensor; negative, counted from the end.
        positions: `(C, K)` int64, the indices along `dim` of that input. They differ from the weight's own positions
            where a grouped convolution sees several blocks.
    """

    weight: str
    dim: int
    positions: Tensor

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the weight."""
        return owner(self.weight)[0]


def owner(tensor: str) -> tuple[str, str]:
    """Return the module that a parameter belongs to, and what it is there.

    A parameter that only goes into a weight counts as the weight: `a.weight_v`, `a.parametrizations.weight.original1`
    and `a.weight_orig` are the "weight" of "a".
    """
    module, _, leaf = re.sub(_PARAMETRIZED, r"\1\2", tensor).rpartition(".")
    return module, re.sub(r"_(orig|v|g)$", "", leaf)


# How torch names what weight_norm, spectral_norm and other parametrizations keep.
_PARAMETRIZED = r"(^|\.)parametrizations\.(\w+)\.original\d*$"


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that must be kept or cut on all their members at once.

    Attributes:
        name: stable and unique within the graph; the module of the first producer.
        size: `C`, the number of channels.
        members: every tensor dimension that a cut of this group narrows.
        inputs: where modules see these channels.
        exact: masking a channel and cutting it give the same output. False behind LayerNorm, a softmax over
            channels, and other operations that mix the channels of the group without a weight.
    """

    name: str
    size: int
    members: Sequence[Member]
    inputs: Sequence[ConsumerInput] = ()
    exact: bool = True

    def of_role(self, role: Role) -> tuple[Member, ...]:
        """Return the members of one role, in the order in which the model uses them."""
        return tuple(member for member in self.members if member.role == role)

    @property
    def consumer_inputs(self) -> tuple[ConsumerInput, ...]:
        """The inputs of consumers alone, also of those whose weight an embedding produces channels with.

        A depthwise convolution shows its channels at its input too, but hands them on: they would count twice.
        """
        followers = {member.tensor for member in self.of_role("follower")}
        return tuple(each for each in self.inputs if each.weight not in followers)

    def rows(self, tensors: Mapping[str, Tensor], role: Role = "producer") -> Tensor:
        """Return each channel's values in all members of a role, one channel a row: `(C, F)`.

        This is the geometry that no criterion has to know. Members whose tensor is missing from `tensors` are left out.

        Args:
            tensors: values (or gradients) by name.
            role: which members; a group without any of this role returns the rows of all its members instead.
        """
        chosen = [member for member in self.of_role(role) if member.tensor in tensors]
        # Behind an Embedding's rows, or where channels only pass, a group may have no producer at all.
        chosen = chosen or [member for member in self.members if member.tensor in tensors]
        rows = [member.rows(tensors[member.tensor]).float() for member in chosen]
        if len(rows) == 1:
            return rows[0]
        return torch.cat(rows, dim=1) if rows else torch.zeros(self.size, 0)


@dataclass(frozen=True)
class Frozen:
    """Channels that cannot be cut, and why.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: its dimension.
        reason: which operation, in which module, at which shape, forbids the cut.
        count: how many positions along `dim` are frozen.
    """

    tensor: str
    dim: int
    reason: str
    count: int = 0


@dataclass(frozen=True)
class Extent:
    """The size of an axis after any cut: `fixed + sum(per_channel[name] * kept channels of group name)`."""

    fixed: int
    per_channel: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """One summand of a cost in closed form: `constant * product of extents`."""

    constant: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class Offset:
    """Where a constant on a weight's output can be put: `tensor += sign * constant` (a bias, or a running mean).

    Attributes:
        tensor: name of the bias or running mean.
        sign: how it is added.
        input_dim: the weight's own, 1 as in `(O, D / blocks, ...)`; 0 in `(D, O / blocks, ...)`, where a convolution is
            transposed, or a matrix is multiplied from the left.
        share: of a kernel's taps, how many add up at one place of the output; of a transposed convolution, which
            spreads them, 1 / the product of its strides on average.
    """

    tensor: str
    sign: Literal[1, -1]
    input_dim: Literal[0, 1] = 1
    share: float = 1.0
