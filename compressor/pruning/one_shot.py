"""Prune: make a trained model smaller at once. Graph, criterion, selection and surgery meet here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.budget import Budget, Limits, PruneResult, PruningProgress, Scope, SelectionOptions
from compressor.criteria import Criterion, Snapshot, lookup, score
from compressor.errors import IdleArgumentError, InputError, UnknownNameError
from compressor.graph import ChannelGraph
from compressor.pruning.to_budget import CutOptions, prune_to_budget, traced
from compressor.surgery import Compensation, Moments, all_optimizers, input_means, input_moments


def prune(
    model: nn.Module,
    example_inputs: Any,
    criterion: str | Criterion = "l1",
    budget: Budget | float = Budget.sparsity,
    *,
    scope: Scope = SelectionOptions.scope,
    round_to: int | None = SelectionOptions.round_to,
    limits: Limits | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    copies: Iterable[nn.Module] = (),
    calibration: Iterable[Any] | None = None,
    compensate: Compensation | None = None,
    verify: bool = False,
    outputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> PruneResult:
    """Make a model smaller at once, in place.

    Args:
        model: any module; gradients must be present for criteria that need them. Of a DistributedDataParallel its
            `module`, which is to be wrapped anew afterwards: the wrapper keeps the old shapes.
        example_inputs: a tensor, a tuple or a dict that `model` accepts.
        criterion: a name from `compressor.CRITERIA`, or a function of a group and a snapshot that returns `(C,)`
            scores, larger means keep.
        budget: what is to go: a number in `[0, 1)`, a share of the parameters, or `Budget(0.5, "macs")`.
        scope, round_to: as in `compressor.budget.SelectionOptions`.
        limits: groups that stay whole, that alone lose channels, or that lose a share of their own.
        optimizer: optimizers whose state is sliced along.
        copies: models that lose the same channels, as for `compressor.cut`.
        calibration: batches of real inputs, for `compensate` and `verify`.
        compensate: "linear" moves what the channels that stay predict of a removed one, over `calibration`, into
            their weights, and the rest of its mean into the next bias or running mean; "mean" does so with its mean
            alone, and "none" with nothing. None: "linear" where there is `calibration`.
        verify: also compare every cut with the masked model, on the first batch of `calibration`, or on
            `example_inputs` where there is none; a group whose cut differs from its mask stays whole, like every group
            that refuses.
        outputs: as for `compressor.trace`.
        seed: for criteria that draw.

    Returns:
        What was removed. A target that cannot be reached is not an error here: `reached` is false, as much as possible
        is removed, and `blocked` says why.

    Raises:
        UnknownNameError, RangeError: a criterion, measure, scope or group that does not exist; a number out of range.
        InputError: a model without parameters; limits that contradict each other; an argument that lacks what it needs
            or has no effect.
        TraceError: the model does not run on the example inputs.
    """
    budget = Budget.from_share(budget)
    selection = SelectionOptions(scope, round_to)
    judge = lookup(criterion)
    batches = list(calibration or ())
    chosen = _chosen(compensate, batches, verify)
    graph = traced(model, example_inputs, outputs)
    progress = PruningProgress(graph)
    shares = (limits or Limits()).shares(graph)
    generator = torch.Generator().manual_seed(seed)
    made = prune_to_budget(
        progress,
        lambda groups: score(judge, groups, Snapshot.from_model(graph.model, generator)),
        budget,
        CutOptions(selection, shares, all_optimizers(optimizer), list(copies), verify),
        means=KNOWN[chosen](graph, batches),
        real_inputs=batches[0] if batches else example_inputs,
    )
    return progress.result(budget, made.blocked if made else ())


# What has to be known of the consumers' inputs for each way of compensation.
KNOWN: dict[Compensation, Callable[[ChannelGraph, list[Any]], Moments | Mapping[str, Tensor] | None]] = {
    "linear": input_moments,
    "mean": input_means,
    "none": lambda graph, batches: None,
}


def _chosen(compensate: Compensation | None, batches: list[Any], verify: bool) -> Compensation:
    """Return how to compensate, if real inputs are there where they are needed, and only there."""
    if compensate is None:
        return "linear" if batches else "none"
    require_compensation(compensate)
    if compensate != "none" and not batches:
        raise InputError(
            f"compensate={compensate!r} needs real inputs: pass calibration=[inputs, ...], or compensate='none'"
        )
    if batches and compensate == "none" and not verify:
        raise IdleArgumentError("calibration", "compensate='none' and verify=False")
    return compensate


def require_compensation(name: str) -> None:
    """Raise UnknownNameError if there is no such compensation."""
    if name not in get_args(Compensation):
        raise UnknownNameError("compensation", name, get_args(Compensation))
