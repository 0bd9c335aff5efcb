"""What a cut destroys: trained ResNets for CIFAR-10, cut at once and not trained any further.

python benchmarks/one_shot.py --data cifar10 --weights FOLDER [--network resnet20] [--share 0.5] [--part rounds]

Part `compensation`: every criterion with every compensation, the same share of the inner channels of every block.
Part `rounds`: small cuts with statistics anew, and widths by relevance, at that share of the network's MACs, from the
inner channels alone and from all channels. BatchNorm statistics are then taken anew for everybody.
"""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from cifar_resnet import data, first_batches, trained
from results_file import write
from torch import nn
from torch.nn import functional as F

import compressor
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

NOTE_ROUNDS = (
    "Accuracy on the 10,000 test images, in percent, without any training after the cut; `recalibrated`: after "
    f"BatchNorm statistics were taken anew on {RECALIBRATION} training images. One run each: nothing draws. "
    f"`allocate`: how much of each group goes. Statistics from {CALIBRATION} training images, anew in every round."
)


def main(
    weights: Annotated[Path, typer.Option(help="Folder with NETWORK-cifar10.safetensors.")],
    source: Annotated[str, typer.Option("--data", help="As for compress --data.")] = "cifar10",
    network: Annotated[str, typer.Option(help="resnet20 or resnet32.")] = "resnet20",
    share: Annotated[float, typer.Option(help="Of the inner channels of every block, or of all MACs.")] = 0.5,
    part: Annotated[str, typer.Option(help="compensation or rounds.")] = "compensation",
) -> None:
    """Measure, write, and print where the table is."""
    found = data(source)
    model = trained(network, weights)
    print({"compensation": by_compensation, "rounds": in_rounds}[part](model, found, network, share))


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


# What is cut, and how: criterion, allocate, rounds, compensation.
WAYS = (
    ("l1", "uniform", 1, "mean"),
    ("l1", "uniform", 1, "linear"),
    ("l1", "uniform", 8, "linear"),
    ("l1", "relevance", 8, "linear"),
    ("relevance", "uniform", 8, "linear"),
    ("relevance", "relevance", 1, "linear"),
    ("relevance", "relevance", 8, "mean"),
    ("relevance", "relevance", 8, "linear"),
    ("relevance", "relevance", 24, "linear"),
)


def in_rounds(model: nn.Module, found: Data, network: str, share: float) -> Path:
    """Measure small cuts, and how much of each group goes."""
    rows: list[dict[str, Any]] = []
    for only in (("layer*.conv1",), ()):
        for criterion, allocate, rounds, compensate in WAYS:
            smaller = copy.deepcopy(model)
            losses = "relevance" in (criterion, allocate)
            pairs = first_batches(found, CALIBRATION)
            result = compressor.prune(
                smaller, pairs[0][0][:1], criterion, compressor.Budget(share, "macs"), rounds=rounds, allocate=allocate,
                limits=compressor.Limits(only=only), compensate=compensate, round_to=1,
                calibration=pairs if losses else [x for x, _ in pairs], loss_fn=F.cross_entropy if losses else None,
            )  # fmt: skip
            at_once = evaluate(smaller, found.test).accuracy
            recalibrate(smaller, found.train, images=RECALIBRATION)
            row = {
                "channels": "inner" if only else "all",
                "criterion": criterion,
                "allocate": allocate,
                "rounds": rounds,
            }
            row |= {"compensate": compensate, "MACs removed %": 100 * result.removed, "cut": 100 * at_once}
            rows.append(row | {"recalibrated": 100 * evaluate(smaller, found.test).accuracy})
            path = write(f"one-shot-rounds-{network}-{share:g}", rows, NOTE_ROUNDS)
    return path


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
        seed=seed, compensate=compensate, calibration=None if compensate == "none" else inputs,
    )  # fmt: skip
    smaller.zero_grad()
    at_once = evaluate(smaller, found.test).accuracy
    recalibrate(smaller, found.train, images=RECALIBRATION)
    return 100 * at_once, 100 * evaluate(smaller, found.test).accuracy


if __name__ == "__main__":
    typer.run(main)
