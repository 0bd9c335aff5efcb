"""Prune: make a trained model smaller at once. Graph, criterion, selection and surgery meet here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from compressor.budget import Budget, Ledger, Limits, PruneResult
from compressor.criteria import Criterion, Snapshot, lookup, score
from compressor.errors import InputError, UnknownNameError
from compressor.pruning.to_budget import How, cut_to, traced
from compressor.surgery import COMPENSATIONS, input_means


def prune(
    model: nn.Module,
    example_inputs: Any,
    criterion: str | Criterion = "l1",
    sparsity: float = 0.5,
    measure: str = "params",
    scope: str = "local",
    round_to: int = 1,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    seed: int = 0,
    *,
    limits: Limits | None = None,
    calibration: Iterable[Any] | None = None,
    compensate: str = "none",
    verify: bool = False,
    copies: Iterable[nn.Module] = (),
) -> PruneResult:
    """Make a model smaller at once, in place.

    Args:
        model: any module; gradients must be present for criteria that need them.
        example_inputs: a tensor, a tuple or a dict that `model` accepts.
        criterion: a name from `compressor.CRITERIA`, or a function of a group and a snapshot that gives `(C,)` scores.
        sparsity: the share to remove, in `[0, 1)`.
        measure: of what: "params", "macs" or "channels".
        scope: "local" takes the same share of every group, "global" ranks all channels together. Weights say little
            about which layer can spare more (`benchmarks/scope.py`); relevance does, in the budget's measure alone.
        round_to: channel counts become multiples of this.
        optimizer: optimizers whose state is sliced along.
        seed: for criteria that draw.
        limits: groups that stay whole, that alone lose channels, or that lose a share of their own.
        calibration: batches of real inputs, for `compensate` and `verify`.
        compensate: "mean" folds what a removed channel carried on average, over `calibration`, into the next bias or
            running mean; "none" does not.
        verify: also compare every cut with the silenced model, on the first batch of `calibration`, or on
            `example_inputs` where there is none; a group whose cut is not its silence stays whole, like every group
            that refuses.
        copies: models that lose the same channels, as for `compressor.cut`.

    Returns:
        What was removed. A target that cannot be reached is not an error here: `reached` is false, as much as possible
        is removed, and `blocked` says why.

    Raises:
        UnknownNameError, RangeError: a criterion, measure, scope or group that does not exist; a number out of range.
        InputError: a model without parameters; limits that contradict each other; an argument that lacks what it needs
            or has no effect.
        TraceError: the model does not run on the example inputs.
    """
    budget, judge = Budget(sparsity, measure), lookup(criterion)
    batches = _batches(calibration, compensate, verify)
    graph = traced(model, example_inputs)
    ledger = Ledger(graph)
    how = How.of(scope, round_to, (limits or Limits()).shares(graph), optimizer, copies, verify)
    generator = torch.Generator().manual_seed(seed)
    made = cut_to(
        ledger,
        lambda groups: score(judge, groups, Snapshot.from_model(graph.model, generator)),
        budget,
        how,
        means=input_means(graph, batches) if compensate == "mean" else None,
        real_inputs=batches[0] if batches else example_inputs,
    )
    return ledger.result(budget, made.blocked if made else ())


def _batches(calibration: Iterable[Any] | None, compensate: str, verify: bool) -> list[Any]:
    """Give the batches of real inputs, if they are there where they are needed, and only there."""
    if compensate not in COMPENSATIONS:
        raise UnknownNameError("compensation", compensate, COMPENSATIONS)
    batches = list(calibration or ())
    if compensate == "mean" and not batches:
        raise InputError("compensate='mean' needs real inputs: pass calibration=[inputs, ...], or compensate='none'")
    if batches and compensate == "none" and not verify:
        raise InputError("calibration has no effect with compensate='none' and verify=False: leave it out")
    return batches
