"""Does compensation help while a network trains? A trained ResNet-20 goes on for some steps and gets smaller meanwhile.

python benchmarks/compensation_in_training.py --data cifar10 --weights FOLDER [--steps 150] [--seeds 2]
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from cifar_resnet import data, first_batches, trained
from results_file import write
from torch.nn import functional as F

import compressor
from compressor.training import Augmentation, evaluate, recalibrate

BATCH, LR, SPARSITY = 128, 0.02, 0.5
NOTE = (
    f"ResNet-20, trained; {SPARSITY:.0%} of its MACs go in ten cuts within {{}} steps of {BATCH} images (SGD, momentum "
    f"0.9, from {LR} to 0, cubic schedule from 10 % to 65 %). Accuracy on the 10,000 test images, BatchNorm "
    "statistics taken anew on 2,000 training images; mean of {} seeds, and each."
)


def main(
    weights: Annotated[Path, typer.Option(help="Folder with resnet20-cifar10.safetensors.")],
    source: Annotated[str, typer.Option("--data", help="As for compress --data.")] = "cifar10",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 150,
    seeds: Annotated[int, typer.Option(help="Orders of the images.")] = 2,
) -> None:
    """Measure, write, and print where the table is."""
    found = data(source)
    rows: list[dict[str, Any]] = []
    for criterion in ("l1", "random"):
        for compensate in ("none", "mean", "linear"):
            each = [trained_on(found, weights, criterion, compensate, steps, seed) for seed in range(seeds)]
            shown = ", ".join(f"{value:.2f}" for value in each)
            rows.append({"criterion": criterion, "compensate": compensate, "accuracy": mean(each), "each": shown})
            path = write("compensation-in-training", rows, NOTE.format(steps, seeds))
    print(path)


def trained_on(found: Any, weights: Path, criterion: str, compensate: str, steps: int, seed: int) -> float:
    """Return the accuracy in percent of a network that was cut while it trained on."""
    model = trained("resnet20", weights).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    calibration = [x for x, _ in first_batches(found, 1000)] if compensate == "linear" else None
    pruner = compressor.Pruner(
        model, torch.zeros(1, 3, 32, 32), criterion, compressor.Budget(SPARSITY, "macs"), optimizer=optimizer,
        total_steps=steps, prune_every=max(1, steps // 18), compensate=compensate, calibration=calibration, seed=seed,
        round_to=1,
    )  # fmt: skip
    batches = found.train.batches(BATCH, shuffle=torch.Generator().manual_seed(seed), augment=Augmentation())
    for _, (x, y) in zip(range(steps), batches, strict=False):
        pruner.loss(x, y, F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        schedule.step()
    recalibrate(model, found.train, images=2000)
    return 100 * evaluate(model, found.test).accuracy


if __name__ == "__main__":
    typer.run(main)
