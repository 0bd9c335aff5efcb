"""Importances of Torch-Pruning as criteria: their scores, on our groups.

    import torch_pruning as tp
    compressor.prune(model, x, criterion=compressor.criteria.from_torch_pruning(tp.importance.GroupTaylorImportance()))

An importance of Torch-Pruning walks a group of its own: pairs of a layer's pruning function and the indices that it
would prune. One is made from each of ours. A channel of ours may hold several indices of every layer (a head of an
attention); then it gets their mean.

Shape letters: C channels of a group; K positions of one channel along a dimension; U the fewest positions of one
channel in any layer of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.criteria.snapshot import Snapshot
from compressor.errors import InputError, ScoreError, UnknownNameError
from compressor.graph import Group, Member

PREFIX = "tp:"
_OWN_PASS = "Hessian", "OBDC", "Activation"  # what they gather in passes of their own, no gradient can stand in for


def from_torch_pruning(importance: Callable[[Any], Tensor | None]) -> Callable[[Group, Snapshot], Tensor]:
    """Return a criterion that scores our groups with an importance of Torch-Pruning.

    Args:
        importance: an object from `torch_pruning.importance`. What it needs beforehand (gradients for
            `GroupTaylorImportance`, `accumulate_grad` for `GroupHessianImportance`) is the caller's to do.

    Returns:
        A criterion: `(C,)` float32, larger means keep. On groups that both libraries see alike these are
        Torch-Pruning's own numbers. It raises ScoreError where the importance fails, or looks at no layer of the group.

    Source: Fang et al., DepGraph: Towards Any Structural Pruning, arXiv 2301.12900.
    """
    name = type(importance).__name__

    def judge(group: Group, snapshot: Snapshot) -> Tensor:
        if not snapshot.modules:
            raise InputError(f"{name} walks modules, and this snapshot shows none: pass Snapshot.from_model(model)")
        theirs, unit = _their_group(group, snapshot.modules)
        try:
            scores = importance(theirs) if len(theirs) else None
        except Exception as error:
            raise ScoreError(group.name, f"{name} failed: {error}", _advice(name)) from error
        if scores is None:
            raise ScoreError(group.name, f"{name} looks at none of its layers", _advice(""))
        if len(scores) != group.size * unit or not scores.isfinite().all():
            reason = f"{name} gave {len(scores)} scores, {int(scores.isfinite().sum())} of them finite"
            raise ScoreError(group.name, reason, _advice(name))
        return scores.detach().float().view(group.size, unit).mean(1)

    judge.__name__ = f"{PREFIX}{name}"
    return judge


def named_importance(name: str) -> Callable[[Group, Snapshot], Tensor]:
    """Return the criterion for `tp:` and a class of `torch_pruning.importance`, with default arguments.

    Raises:
        UnknownNameError: there is no such class.
        InputError: it gathers what it needs in passes of its own, or Torch-Pruning is not installed.
    """
    try:
        from torch_pruning.pruner import importance
    except ImportError as error:
        raise InputError(f"{name} needs Torch-Pruning: pip install torch-pruning, or use another criterion") from error
    known = {
        f"{PREFIX}{each.__name__}": each
        for each in vars(importance).values()
        if isinstance(each, type) and issubclass(each, importance.Importance) and each is not importance.Importance
    }
    if name not in known:
        raise UnknownNameError("criterion", name, known)
    if any(word in name for word in _OWN_PASS):
        raise InputError(
            f"{name} needs passes of its own over data before it can score: prepare it in Python and pass "
            "criterion=compressor.criteria.from_torch_pruning(importance), or use tp:GroupTaylorImportance"
        )
    return from_torch_pruning(known[name]())


def _advice(name: str) -> str:
    if "Taylor" in name or "Hessian" in name:
        return "run backward on some batches before scoring, or use another criterion, l1 say"
    return "use another criterion, l1 say"


# -- their groups from ours


def _their_group(group: Group, modules: Mapping[str, nn.Module]) -> tuple[Any, int]:
    """Return a group as Torch-Pruning has them, and U."""
    from torch_pruning import ops
    from torch_pruning.dependency import Dependency, Node
    from torch_pruning.dependency import Group as TheirGroup
    from torch_pruning.pruner.function import PrunerBox

    layers = list(_layers(group, modules))
    unit = min((positions.shape[1] for _, _, positions in layers), default=1)
    # NOTE: Their scores are as long as those of the first layer. One with K = U goes first; the order stays otherwise.
    layers.sort(key=lambda layer: layer[2].shape[1] != unit)
    theirs = TheirGroup()
    for name, member, positions in layers:
        kind = ops.module2type(modules[name])
        if kind in PrunerBox:
            pruner = PrunerBox[kind]
            node = Node(modules[name], None, name)
            prune = pruner.prune_in_channels if member.role == "consumer" else pruner.prune_out_channels
            indices, roots = _in_order(positions, unit)
            theirs.add_dep(Dependency(prune, prune, node, node), indices)
            theirs[-1].root_idxs = roots
    return theirs, unit


def _layers(group: Group, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Member, Tensor]]:
    """Return the module, member and positions of every weight; their layers come with bias and statistics."""
    seen = {each.weight: each.positions for each in group.inputs}
    for member in group.members:
        name, _, leaf = member.tensor.rpartition(".")
        if leaf != "weight" or name not in modules:
            continue
        # A grouped convolution's weight counts the channels of one block; they count those of its whole input.
        blocks = member.role == "consumer" and getattr(modules[name], "groups", 1) > 1
        yield name, member, seen.get(member.tensor, member.positions) if blocks else member.positions


def _in_order(positions: Tensor, unit: int) -> tuple[list[int], list[int]]:
    """Return a layer's indices in ascending order, and for each which of the `C * U` scores it adds to."""
    channels, width = positions.shape
    roots = torch.arange(channels).unsqueeze(1) * unit + torch.arange(width) * unit // width
    order = positions.flatten().argsort()
    return positions.flatten()[order].tolist(), roots.flatten()[order].tolist()
