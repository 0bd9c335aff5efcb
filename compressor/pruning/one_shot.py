"""Prune: make a trained model smaller at once. Graph, criterion, selection and surgery meet here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import (
    OwnForward,
    ambient_modes_disabled,
    count_samples,
    device_of,
    eval_mode,
    require_reduction,
    run_batch,
    to_device,
    unwrap_compiled,
)
from compressor.budget import (
    MOST_ROUNDS,
    Allocation,
    Budget,
    Limits,
    PruneResult,
    PruningProgress,
    SelectionOptions,
    Threshold,
    usual_rounding,
)
from compressor.criteria import Criterion, Snapshot, lookup, needs_gradients, score
from compressor.errors import IdleArgumentError, InputError, RangeError, UnknownNameError
from compressor.graph import ChannelGraph, Group
from compressor.pruning.aims import Aims
from compressor.pruning.calibration import require_batches, require_runs
from compressor.pruning.relevance_scores import per_cost, with_magnitude
from compressor.pruning.to_budget import CutOptions, prune_to_budget, traced
from compressor.relevance import gate_relevance
from compressor.surgery import Compensation, Moments, Reference, all_optimizers, input_means, input_moments
from compressor.surgery import reconstruct as fit_layers


@ambient_modes_disabled()
def prune(
    model: nn.Module,
    example_inputs: Any,
    criterion: str | Criterion = "l1",
    budget: Budget | Threshold | float = Budget.sparsity,
    *,
    rounds: int = 1,
    allocate: Allocation | None = None,
    round_to: int | None = SelectionOptions.round_to,
    limits: Limits | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    copies: Iterable[nn.Module] = (),
    calibration: Iterable[Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    compensate: Compensation | None = None,
    reconstruct: bool | None = None,
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
            scores, larger means keep. Or "relevance", which reads gate gradients over `calibration` with `loss_fn`.
        budget: what is to go: a number in `[0, 1)`, a share of the parameters, or `Budget(0.5, "macs")`.
            Or `Budget(0.5, LatencyCost())`, which is predicted, measured, and cut on until what was asked is measured.
            Or `Threshold(0.3)`: every channel whose score is below.
        rounds: cut in so many steps, and take all statistics anew before each.
        allocate, round_to: as in `compressor.budget.SelectionOptions`. Allocate None: "relevance" for that criterion,
            else "uniform".
        limits: groups that stay whole, that alone lose channels, or that lose a share of their own.
        optimizer: optimizers whose state is sliced along.
        copies: models that lose the same channels, as for `compressor.cut`.
        calibration: batches of real inputs, for `compensate` and `verify`; with `loss_fn` pairs of inputs and targets.
        loss_fn: like `torch.nn.functional.cross_entropy`: takes outputs, targets and `reduction=`. For "relevance", as
            criterion or allocation, and for criteria that read gradients, which are then gathered here.
        forward: how to run the model on a batch of `calibration`, which may then be anything that has a tensor with the
            batch first: `lambda model, batch: model(batch["image"])`. In place of `loss_fn` it returns the loss, of the
            batch or `(B,)` of its samples: `lambda model, batch: sum(model.train()(*batch).values())`.
        compensate: "linear" moves what the channels that stay predict of a removed one, over `calibration`, into
            their weights, and the rest of its mean into the next bias or running mean; "mean" does so with its mean
            alone, and "none" with nothing. None: "linear" where there is `calibration`.
        reconstruct: after the last cut fit every layer, over `calibration`, to what it returned in the whole model
            (`compressor.surgery.reconstruct`). None: where `compensate` is "linear".
        verify: also compare every cut with the masked model, on the first batch of `calibration`, or on
            `example_inputs` where there is none; a group whose cut differs from its mask stays whole, like every group
            that refuses.
        outputs: as for `compressor.trace`.
        seed: for criteria that draw.

    Returns:
        What was removed. A target that cannot be reached is not an error here: `reached` is false, as much as possible
        is removed, and `blocked` says why.

    Raises:
        UnknownNameError, RangeError: a criterion, measure, allocation or group that does not exist; a number out of
            range.
        InputError: a model without parameters; limits that contradict each other; an argument that lacks what it needs
            or has no effect.
        TraceError: the model does not run on the example inputs.
    """
    threshold = budget if isinstance(budget, Threshold) else None
    budget = Budget(0.0) if isinstance(budget, Threshold) else Budget.from_share(budget)
    by_itself = criterion == RELEVANCE
    if threshold:
        _require_threshold(threshold, criterion, rounds, allocate)
    allocation = allocate or ("relevance" if by_itself else SelectionOptions.allocate)
    selection = SelectionOptions(allocation, usual_rounding(round_to, threshold), aligned=budget.aligned)
    if not (isinstance(rounds, int) and 1 <= rounds <= MOST_ROUNDS):
        raise RangeError("rounds", rounds, f"1 to {MOST_ROUNDS}, whole numbers")
    if forward:
        calibration, loss_fn = _run_by(forward, calibration, loss_fn, criterion, selection.allocate)
    pairs = _pairs(calibration, loss_fn, criterion, selection.allocate)
    batches = [inputs for inputs, _ in pairs] if loss_fn else list(calibration or ())
    require_batches(batches, example_inputs)
    judge = None if by_itself else lookup(criterion)
    if reconstruct and not batches:
        raise InputError("reconstruct=True needs real inputs: pass calibration=[inputs, ...]")
    chosen = _chosen(compensate, batches, idle=not verify and not reconstruct and loss_fn is None)
    reconstruct = chosen == "linear" if reconstruct is None else reconstruct
    graph = traced(model, example_inputs, outputs)
    progress = PruningProgress(graph, budget, threshold)
    shares = (limits or Limits()).shares(graph)
    generator = torch.Generator().manual_seed(seed)
    options = CutOptions(
        selection, shares, all_optimizers(optimizer), [unwrap_compiled(each) for each in copies], verify, threshold
    )
    if reconstruct and chosen == "none":  # else statistics are taken of every batch, before the first cut
        require_runs(graph.model, batches)
    reference = Reference(graph) if reconstruct else None
    made = None
    look = None if isinstance(budget.measure, str) else budget.measure.watch(graph)
    aims = Aims(budget, rounds, progress, look)
    for aim, due in aims:
        known = Moments.of(KNOWN[chosen](graph, batches))
        reads_gates = RELEVANCE in (criterion, selection.allocate)
        relevance = gate_relevance(graph, pairs, loss_fn, known) if loss_fn and reads_gates else {}

        def judged(groups: Sequence[Group], found: Mapping[str, Tensor] = relevance) -> Mapping[str, Tensor]:
            if judge is None:
                return with_magnitude(found, score("l1", groups, Snapshot.from_model(graph.model, generator)))
            with _gradients(graph.model, pairs, loss_fn if needs_gradients(criterion) else None):
                return score(judge, groups, Snapshot.from_model(graph.model, generator))

        def allocated(groups: Sequence[Group], found: Mapping[str, Tensor] = relevance) -> Mapping[str, Tensor]:
            # As for `relevance_scores`.
            return per_cost(found, graph, budget.measure) if isinstance(budget.measure, str) else found

        table = graph.table
        made = prune_to_budget(
            progress,
            judged,
            aim,
            options,
            due=due,
            means=known if known else None,
            normalise=selection.allocate != RELEVANCE,
            real_inputs=batches[0] if batches else example_inputs,
            allocation=allocated if selection.allocate == RELEVANCE else None,
        )
        if reference and made:
            reference.follow(table, graph.uncoupled(made.keep))

    if reference and progress.has_changed():
        fit_layers(graph, reference, batches)
    graph.note(aims.lines())
    measured = aims.seen.removed if aims.seen else None
    return progress.result(budget, made.blocked if made else (), measured, reached=aims.is_reached())


RELEVANCE = "relevance"


def _require_threshold(threshold: Threshold, criterion: object, rounds: int, allocate: str | None) -> None:
    """Refuse what a threshold has no use for.

    Raises:
        InputError: a criterion whose scores have no unit.
        IdleArgumentError: how much goes is said twice.
    """
    threshold.require_unit(criterion)
    if criterion == RELEVANCE:
        raise InputError("a threshold for relevance is a confidence, which a Pruner gathers in training: give a budget")
    for name, is_given in (("rounds", rounds != 1), ("allocate", allocate is not None)):
        if is_given:
            raise IdleArgumentError(name, "a threshold")


def _run_by(
    forward: Callable[[nn.Module, Any], Any],
    calibration: Iterable[Any] | None,
    loss_fn: Callable[..., Tensor] | None,
    criterion: str | Criterion,
    allocate: str,
) -> tuple[list[Any], Callable[..., Tensor] | None]:
    """Return batches that `forward` runs, in pairs with nothing where it returns losses, and what makes losses of them.

    Raises:
        IdleArgumentError: a `loss_fn` too.
        InputError: no batches.
    """
    if loss_fn:
        raise IdleArgumentError("loss_fn", "forward, which returns the loss itself")
    batches = [OwnForward(forward, batch) for batch in calibration or ()]
    if not batches:
        raise InputError("forward runs the batches of calibration: pass calibration=[batch, ...]")
    if RELEVANCE not in (criterion, allocate) and not needs_gradients(criterion):
        return batches, None
    return [(batch, count_samples(batch)) for batch in batches], _summed


def _summed(loss: Any, samples: int, *, reduction: str = "sum") -> Tensor:
    """Return the sum over the samples, of which `loss` is a mean, or one by one."""
    if not isinstance(loss, Tensor):
        raise InputError(
            f"forward returned a {type(loss).__name__}: give the loss, for a criterion or allocation that reads it"
        )
    return loss.sum() if loss.dim() else loss * samples


def _pairs(
    calibration: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None, criterion: str | Criterion, allocate: str
) -> list[tuple[Any, Any]]:
    """Return inputs with targets, where a loss is to be computed, and only there.

    Raises:
        InputError: no loss or no pairs where something reads them, or a loss without `reduction=`.
        IdleArgumentError: a loss that nothing reads.
    """
    reads = RELEVANCE in (criterion, allocate)
    if loss_fn is None:
        if reads:
            raise InputError(
                "relevance needs losses: pass calibration=[(inputs, targets), ...] and loss_fn=F.cross_entropy"
            )
        return []
    if not reads and not needs_gradients(criterion):
        raise IdleArgumentError("loss_fn", f"criterion {criterion!r}")
    require_reduction(loss_fn)
    pairs = list(calibration or ())
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise InputError("with loss_fn, calibration is pairs: pass calibration=[(inputs, targets), ...]")
    return pairs


@contextmanager
def _gradients(
    model: nn.Module, pairs: Sequence[tuple[Any, Any]], loss_fn: Callable[..., Tensor] | None
) -> Iterator[None]:
    """Leave the gradient of the summed loss on the parameters inside the `with`, and what was there afterwards."""
    if loss_fn is None:
        yield
        return
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    device = device_of(model)
    try:
        for parameter, _ in before:
            parameter.grad = None
        with eval_mode(model), torch.enable_grad():
            for inputs, targets in pairs:
                loss = loss_fn(run_batch(model, inputs), to_device(targets, device), reduction="sum")
                loss.backward()  # type: ignore[no-untyped-call]
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


# What has to be known of the consumers' inputs for each way of compensation.
KNOWN: dict[Compensation, Callable[[ChannelGraph, list[Any]], Moments | Mapping[str, Tensor] | None]] = {
    "linear": input_moments,
    "mean": input_means,
    "none": lambda graph, batches: None,
}


def _chosen(compensate: Compensation | None, batches: list[Any], idle: bool) -> Compensation:
    """Return how to compensate, if real inputs are there where they are needed, and only there.

    `idle`: nothing but compensation would read the batches.
    """
    if compensate is None:
        return "linear" if batches else "none"
    require_compensation(compensate)
    if compensate != "none" and not batches:
        raise InputError(
            f"compensate={compensate!r} needs real inputs: pass calibration=[inputs, ...], or compensate='none'"
        )
    if batches and compensate == "none" and idle:
        raise IdleArgumentError("calibration", "compensate='none' and verify=False")
    return compensate


def require_compensation(name: str) -> None:
    """Raise UnknownNameError if there is no such compensation."""
    if name not in get_args(Compensation):
        raise UnknownNameError("compensation", name, get_args(Compensation))
