"""Does a criterion know which layer can spare more? Cuts after training, all channels ranked together or by group.

python benchmarks/allocation.py [--seeds 3]

The network and the data of `intraining.py --part accuracy` (a tenth of CIFAR-10 on a CPU). Every criterion cuts the
same trained network at once, means folded, BatchNorm statistics taken anew, without any training afterwards.
"""

from __future__ import annotations

import copy
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from intraining import accuracy
from results_file import write
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.budget.options import ALLOCATIONS
from compressor.training import PlainStep, TrainingConfig, evaluate, recalibrate, train

NOTE = (
    "Accuracy on the test part, in percent, right after a cut of a trained network: mean over the seeds, and smallest "
    "and largest. `global` ranks the channels of all groups together (scores divided by the group's mean), `uniform` "
    "takes the same share of every group. No training follows."
)
SPARSITIES = (0.3, 0.5, 0.7)
CALIBRATION, GRADIENTS = 8, 30  # batches for the means, and for the gradients of taylor
BATCH = 64


def trained(seed: int) -> nn.Module:
    """Return the dense network, with the gradients of a part of the training data."""
    found = accuracy.data("cifar10")
    model = accuracy.network(len(found.classes), seed)
    config = TrainingConfig(accuracy.EPOCHS["cifar10"], BATCH, 0.05, seed=seed, device=accuracy.DEVICE)
    train(model, found, config, PlainStep)
    model.eval()
    for x, y in batches(GRADIENTS):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    return model


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first batches of the training data."""
    every = accuracy.data("cifar10").train.batches(BATCH, device=accuracy.DEVICE)
    return [batch for batch, _ in zip(every, range(count), strict=False)]


def after_cut(model: nn.Module, criterion: str, sparsity: float, allocate: str, seed: int) -> float:
    """Return the accuracy in percent of a copy that was cut."""
    smaller, found = copy.deepcopy(model), accuracy.data("cifar10")
    for parameter, whole in zip(smaller.parameters(), model.parameters(), strict=True):
        parameter.grad = None if whole.grad is None else whole.grad.clone()
    compressor.prune(
        smaller, torch.zeros(1, *found.image_shape, device=accuracy.DEVICE), criterion, sparsity, allocate=allocate,
        round_to=2, seed=seed, calibration=[x for x, _ in batches(CALIBRATION)], compensate="mean",
    )  # fmt: skip
    recalibrate(smaller, found.train, images=2000, device=accuracy.DEVICE)
    return 100 * evaluate(smaller, found.test, device=accuracy.DEVICE).accuracy


def main(seeds: Annotated[int, typer.Option(help="Networks, each of a seed of its own.")] = 3) -> None:
    """Measure every criterion at every sparsity, both ways."""
    models, rows = [trained(seed) for seed in range(seeds)], list[dict[str, Any]]()
    for sparsity in SPARSITIES:
        for criterion in compressor.CRITERIA:
            row: dict[str, Any] = {"params removed %": 100 * sparsity, "criterion": criterion, "n": seeds}
            for allocate in ALLOCATIONS:
                found = [after_cut(model, criterion, sparsity, allocate, seed) for seed, model in enumerate(models)]
                row |= {allocate: mean(found), f"{allocate}, range": f"{min(found):.1f}-{max(found):.1f}"}
            rows.append(row)
            path = write("allocation", rows, NOTE)
    print(path)


if __name__ == "__main__":
    typer.run(main)
