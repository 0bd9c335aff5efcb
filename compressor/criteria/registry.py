"""Criteria: functions that score the channels of a group.

    def l1(group: Group, snapshot: Snapshot) -> Tensor:  # (C,) float32, finite, larger means keep
        return group.rows(snapshot.values).abs().sum(dim=1)

A function of your own works everywhere a name works. To give it a name, put it into `CRITERIA`. Torch-Pruning's
importances work too: `from_torch_pruning(importance)`, or by name `tp:GroupTaylorImportance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from compressor.criteria.gradient import taylor
from compressor.criteria.random import random
from compressor.criteria.snapshot import Snapshot
from compressor.criteria.torch_pruning import PREFIX, named_importance
from compressor.criteria.weight import bn_scale, euclidean, geometric_median, l1, l2
from compressor.errors import ScoreError, UnknownNameError
from compressor.graph import Group

Criterion: TypeAlias = Callable[[Group, Snapshot], Tensor]

CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "euclidean": euclidean,
    "geometric_median": geometric_median,
    "bn_scale": bn_scale,
    "taylor": taylor,
    "random": random,
}


def lookup(criterion: str | Criterion) -> Criterion:
    """Return the criterion of that name; a function is given back as it is.

    Raises:
        UnknownNameError: no criterion has that name.
        InputError: an importance of Torch-Pruning that cannot be used by name alone.
    """
    if callable(criterion):
        return criterion
    if criterion.startswith(PREFIX):
        return named_importance(criterion)
    if criterion not in CRITERIA:
        raise UnknownNameError(
            "criterion", criterion, CRITERIA, hint="a function (group, snapshot) -> scores works too"
        )
    return CRITERIA[criterion]


def needs_gradients(criterion: str | Criterion) -> bool:
    """Return whether a criterion by this name scores by gradients, which the caller has to gather beforehand."""
    return isinstance(criterion, str) and "taylor" in criterion.lower()


def score(criterion: str | Criterion, groups: Sequence[Group], snapshot: Snapshot) -> dict[str, Tensor]:
    """Score every group that the criterion can judge.

    A group that it cannot judge (`bn_scale` without a BatchNorm, `taylor` on weights that do not train) is left out:
    a selection then keeps it whole and says so.

    Args:
        criterion: a name from `CRITERIA`, or a function like those in it.
        groups: usually `graph.groups`.
        snapshot: the tensors to look at; `Snapshot.from_model(model)`.

    Returns:
        By group name, `(C,)` scores, larger means keep.

    Raises:
        UnknownNameError: no criterion has that name.
        ScoreError: the criterion cannot judge a single group; the message is about the first of them.
    """
    judge = lookup(criterion)
    scores: dict[str, Tensor] = {}
    refusals: list[ScoreError] = []
    for group in groups:
        try:
            scores[group.name] = judge(group, snapshot)
        except ScoreError as refusal:
            refusals.append(refusal)
    if refusals and not scores:
        raise refusals[0]
    return scores
