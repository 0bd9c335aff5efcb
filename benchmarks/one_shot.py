"""What a cut destroys: trained ResNets for CIFAR-10, cut at once and not trained any further.

python benchmarks/one_shot.py --data cifar10 --weights FOLDER [--network resnet20] [--share 0.5] [--part parts]

Part `compensation`: every criterion with every compensation, the same share of the inner channels of every block.
Part `parts`: that share of the network's MACs goes from all channels, with all that we have and without each part.
Part `criteria`: the same share, every criterion with every allocation, all else alike.
"""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Annotated, Any

import typer
from cifar_resnet import data, first_batches, trained
from results_file import write
from torch import nn
from torch.nn import functional as F

import compressor
from compressor.budget import ALLOCATIONS
from compressor.surgery import COMPENSATIONS
from compressor.training import Data, evaluate, recalibrate

CRITERIA = ("random", "l1", "l2", "euclidean", "geometric_median", "taylor", "tp:GroupTaylorImportance")
SEEDS = 4  # of random; the other criteria draw nothing
CALIBRATION, GRADIENTS, RECALIBRATION = 1000, 5000, 2000  # images of the training part

NOTE = (
    "Accuracy on the 10,000 test images, in percent, without any training after the cut; `recalibrated`: after "
    f"BatchNorm statistics were taken anew on {RECALIBRATION} training images. `random`: mean and standard deviation "
    f"of {SEEDS} seeds. Means and covariances from {CALIBRATION} training images."
)

_STATE = (
    "Accuracy on the 10,000 test images, in percent, without any training after the cut; `recalibrated`: after "
    f"BatchNorm statistics were taken anew on {RECALIBRATION} training images. All channels may go. Statistics from "
    f"{CALIBRATION} training images, anew in every round; `seconds`: of the whole cut, on one thread. "
)
NOTE_PARTS = _STATE + "The first row is the usual way; the next ones lack one part of it each."
NOTE_CRITERIA = _STATE + (
    "Everybody: 8 rounds, linear compensation, reconstruction. `allocate`: how much of each group goes."
)


def main(
    weights: Annotated[Path, typer.Option(help="Folder with NETWORK-cifar10.safetensors.")],
    source: Annotated[str, typer.Option("--data", help="As for compress --data.")] = "cifar10",
    network: Annotated[str, typer.Option(help="resnet20 or resnet32.")] = "resnet20",
    share: Annotated[float, typer.Option(help="Of the inner channels of every block, or of all MACs.")] = 0.5,
    part: Annotated[str, typer.Option(help="compensation, usual, parts or criteria.")] = "compensation",
) -> None:
    """Measure, write, and print where the table is."""
    found = data(source)
    model = trained(network, weights)
    parts = {"compensation": by_compensation, "usual": usual, "parts": what_helps, "criteria": by_criterion}
    print(parts[part](model, found, network, share))


def by_compensation(model: nn.Module, found: Data, network: str, share: float) -> Path:
    """Measure every criterion with every compensation."""
    for x, y in first_batches(found, GRADIENTS):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    rows: list[dict[str, Any]] = [{"criterion": "dense", "recalibrated": 100 * evaluate(model, found.test).accuracy}]
    for criterion in CRITERIA:
        for compensate in reversed(COMPENSATIONS):
            seeds = range(SEEDS if criterion == "random" else 1)
            pairs = [after_cut(model, found, criterion, compensate, share, seed) for seed in seeds]
            row = {"criterion": criterion, "compensate": compensate, "n": len(pairs)}
            for name, values in zip(("cut", "recalibrated"), zip(*pairs, strict=True), strict=True):
                row |= {name: mean(values), f"{name} sd": stdev(values) if len(values) > 1 else ""}
            rows.append(row)
            path = write(f"one-shot-{network}-{share:g}", rows, NOTE)
    return path


USUAL = {"criterion": "relevance", "allocate": "relevance", "rounds": 8, "compensate": "linear", "reconstruct": True}

# The usual way, and each part of it taken away alone; then L1 norm as everyone does it, and each part put in.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"reconstruct": False},
    {"compensate": "mean"},
    {"compensate": "none"},
    {"rounds": 1},
    {"allocate": "uniform"},
    {"criterion": "l1"},
    {"criterion": "l1", "allocate": "uniform", "rounds": 1, "compensate": "none", "reconstruct": False},
    {"criterion": "l1", "allocate": "uniform", "rounds": 1, "compensate": "linear", "reconstruct": False},
    {"criterion": "l1", "allocate": "uniform", "rounds": 1, "compensate": "none"},
    {"criterion": "l1", "allocate": "uniform", "rounds": 1},
    {"criterion": "random", "allocate": "uniform", "rounds": 1},
)


def usual(model: nn.Module, found: Data, network: str, share: float) -> Path:
    """Measure the usual way alone."""
    return write(f"one-shot-usual-{network}-{share:g}", [USUAL | accuracies(model, found, share, **USUAL)], NOTE_PARTS)


def what_helps(model: nn.Module, found: Data, network: str, share: float) -> Path:
    """Measure the usual way, and what each part of it is worth."""
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        how = USUAL | way
        rows.append(how | accuracies(model, found, share, **how))
        path = write(f"one-shot-parts-{network}-{share:g}", rows, NOTE_PARTS)
    return path


def by_criterion(model: nn.Module, found: Data, network: str, share: float) -> Path:
    """Measure every criterion in the two allocations, all else alike."""
    rows: list[dict[str, Any]] = []
    for allocate in ALLOCATIONS:
        for criterion in (*CRITERIA, "relevance"):
            for seed in range(2 if criterion == "random" else 1):
                how = USUAL | {"criterion": criterion, "allocate": allocate}
                row = {"criterion": criterion, "allocate": allocate, "seed": seed}
                rows.append(row | accuracies(model, found, share, seed=seed, **how))
                path = write(f"one-shot-criteria-{network}-{share:g}", rows, NOTE_CRITERIA)
    return path


def accuracies(model: nn.Module, found: Data, share: float, **how: Any) -> dict[str, float]:
    """Return the accuracy in percent of a copy that lost a share of its MACs, as it is and recalibrated."""
    smaller = copy.deepcopy(model)
    pairs = first_batches(found, CALIBRATION)
    losses = "relevance" in (how["criterion"], how["allocate"]) or "aylor" in how["criterion"]
    reads = losses or how["compensate"] != "none" or how["reconstruct"]
    began = perf_counter()
    result = compressor.prune(
        smaller, pairs[0][0][:1], budget=compressor.Budget(share, "macs"), round_to=1, **how,
        calibration=None if not reads else pairs if losses else [x for x, _ in pairs],
        loss_fn=F.cross_entropy if losses else None,
    )  # fmt: skip
    seconds = perf_counter() - began
    at_once = evaluate(smaller, found.test).accuracy
    recalibrate(smaller, found.train, images=RECALIBRATION)
    row = {"MACs removed %": 100 * result.removed, "params removed %": 100 * (1 - result.params[1] / result.params[0])}
    again = 100 * evaluate(smaller, found.test).accuracy
    return row | {"as cut": 100 * at_once, "recalibrated": again, "seconds": seconds}


def after_cut(
    model: nn.Module, found: Data, criterion: str, compensate: str, share: float, seed: int
) -> tuple[float, float]:
    """Return the accuracy in percent of a copy that was cut, at once and after recalibration."""
    smaller = copy.deepcopy(model)
    for parameter, whole in zip(smaller.parameters(), model.parameters(), strict=True):
        parameter.grad = whole.grad
    inputs = [x for x, _ in first_batches(found, CALIBRATION)]
    compressor.prune(
        smaller, inputs[0][:1], criterion, 0.0, limits=compressor.Limits(sparsity={"layer*.conv1": share}), round_to=1,
        seed=seed, compensate=compensate, reconstruct=False, calibration=None if compensate == "none" else inputs,
    )  # fmt: skip
    smaller.zero_grad()
    at_once = evaluate(smaller, found.test).accuracy
    recalibrate(smaller, found.train, images=RECALIBRATION)
    return 100 * at_once, 100 * evaluate(smaller, found.test).accuracy


if __name__ == "__main__":
    typer.run(main)
