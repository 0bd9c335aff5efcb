"""Cut a trained ResNet at once and train it for an epoch or a few: what fine-tuning leaves of a cut's differences.

python benchmarks/short_training.py --data cifar10 --weights FOLDER [--network resnet20] [--share 0.5] [--epochs 1] \
    [--seeds 4] [--only inner] [--methods relevance,l1,random] [--held-out 0.1] [--compiled]

A seed is an order of the images, the same for every method, so that differences are paired. A cell that the latest
result file of a machine like this one holds already is not run again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from cifar_resnet import NETWORKS, data, first_batches, trained
from results_file import earlier, write
from scipy import stats
from torch import nn
from torch.nn import functional as F

import compressor
from compressor.training import Augmentation, Data, distilled, evaluate

BATCH, LR, CALIBRATION = 128, 0.02, 1000
USUAL = {"allocate": "uniform", "rounds": 8, "compensate": "linear", "reconstruct": True}
METHODS: dict[str, dict[str, Any]] = {
    "relevance": USUAL | {"criterion": "relevance", "allocate": "relevance"},
    "l1": USUAL | {"criterion": "l1"},
    "random": USUAL | {"criterion": "random"},
    "euclidean": USUAL | {"criterion": "euclidean"},
    "l1 in widths by relevance": USUAL | {"criterion": "l1", "allocate": "relevance"},
    "l1 with mean alone": USUAL | {"criterion": "l1", "rounds": 1, "compensate": "mean", "reconstruct": False},
    "relevance distilled": USUAL | {"criterion": "relevance", "allocate": "relevance"},
    "relevance while training": {"criterion": "relevance", "allocate": "relevance", "compensate": "linear"},
    "l1 while training": {"criterion": "l1", "compensate": "linear"},
    "random weights": USUAL | {"criterion": "l1", "rounds": 1, "compensate": "none", "reconstruct": False},
    "random weights distilled": USUAL | {"criterion": "l1", "rounds": 1, "compensate": "none", "reconstruct": False},
    "random with mean alone": USUAL | {"criterion": "random", "rounds": 1, "compensate": "mean", "reconstruct": False},
}
DISTILLED = ("relevance distilled", "random weights distilled")  # taught by the network as it was before the cut
GRADUAL = ("relevance while training", "l1 while training")  # cut in steps within the first half of the training
UNTRAINED = ("random weights", "random weights distilled")  # cut from a network that was never trained
SHARE, TEMPERATURE = 0.5, 4.0  # of the loss that is the teacher's, and of its soft targets
NOTE = (
    f"Accuracy in percent; SGD, momentum 0.9, batches of {BATCH}, learning rate {LR} falling to 0 (cosine), weight "
    "decay 1e-4, flips and shifts, on the training images that are not held out for validation. `cut`: test accuracy "
    "before training. Unless said otherwise everybody has 8 rounds, linear compensation and reconstruction over "
    f"{CALIBRATION} images. Distilled: {SHARE:.0%} of the loss is the uncut network's, at temperature {TEMPERATURE:g}. "
    "While training: the whole network learns, and is cut in ten steps within the first half of as many steps. "
    "Random weights: the same network as L1 cuts it, never trained, in one cut without compensation. Differences: "
    "paired over seeds, with a 95 % t interval."
)


def main(
    weights: Annotated[Path, typer.Option(help="Folder with NETWORK-cifar10.safetensors.")],
    source: Annotated[str, typer.Option("--data", help="As for compress --data.")] = "cifar10",
    network: Annotated[str, typer.Option(help="resnet20 or resnet32.")] = "resnet20",
    share: Annotated[float, typer.Option(help="Of all MACs, that goes.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Of training after the cut.")] = 1,
    seeds: Annotated[int, typer.Option(help="Orders of the images.")] = 4,
    only: Annotated[str, typer.Option(help="all channels, or inner: inside the blocks.")] = "all",
    held_out: Annotated[float, typer.Option(help="Of the 50,000 training images, for validation.")] = 0.1,
    compiled: Annotated[bool, typer.Option(help="Train by torch.compile, where nothing is cut meanwhile.")] = False,
    methods: Annotated[str, typer.Option(help="Comma list of rows.")] = ",".join(
        name for name in METHODS if name not in (*DISTILLED, *GRADUAL, *UNTRAINED)
    ),
) -> None:
    """Measure, write, and print where the table is."""
    found = data(source, held_out)
    name = f"short-{network}-{share:g}-{only}-{epochs}" + ("" if held_out == 0.1 else f"-held-out-{held_out:g}")
    rows = earlier(f"{name}-cells")
    done = {(row["method"], row["seed"]) for row in rows}
    cuts: dict[str, nn.Module] = {}
    for seed in range(seeds):
        for method, how in METHODS.items():
            if method not in methods.split(",") or (method, seed) in done:
                continue
            row: dict[str, Any] = {"method": method, "seed": seed}
            if method in GRADUAL:
                model = trained(network, weights)
                train(model, found, epochs, seed, make_pruner=partial(pruner, found, share, only, seed, how))
            else:
                alike = f"{how} {method in UNTRAINED}" + f" {seed}" * (how["criterion"] == "random")
                if alike not in cuts:
                    torch.manual_seed(seed)
                    start = NETWORKS[network]() if method in UNTRAINED else trained(network, weights)
                    cuts[alike] = cut(start, found, share, only, seed, how)
                model = copy.deepcopy(cuts[alike])
                row["cut"] = 100 * evaluate(model, found.test).accuracy
                teacher = trained(network, weights) if method in DISTILLED else None
                train(model, found, epochs, seed, teacher, compiled=compiled)
            row |= {part: 100 * evaluate(model, getattr(found, part)).accuracy for part in ("validation", "test")}
            rows.append(row)
            write(f"{name}-cells", rows, NOTE)
            path = write(name, table(rows), NOTE)
    print(path)


def cut(model: nn.Module, found: Data, share: float, only: str, seed: int, how: dict[str, Any]) -> nn.Module:
    """Return the model less a share of its MACs."""
    pairs = first_batches(found, CALIBRATION)
    losses = "relevance" in (how["criterion"], how["allocate"])
    images: dict[str, Any] = {"calibration": pairs, "loss_fn": F.cross_entropy} if losses else {}
    if not losses and how["compensate"] != "none":
        images = {"calibration": [x for x, _ in pairs]}
    compressor.prune(
        model, pairs[0][0][:1], budget=compressor.Budget(share, "macs"), round_to=1, seed=seed, limits=limits(only),
        **images, **how,
    )  # fmt: skip
    return model


def limits(only: str) -> compressor.Limits:
    """Return which groups lose channels."""
    return compressor.Limits(only=("layer*.conv1",) if only == "inner" else ())


def pruner(
    found: Data, share: float, only: str, seed: int, how: dict[str, Any], model: nn.Module, optimizer: Any, steps: int
) -> compressor.Pruner:
    """Return what cuts a share of the MACs within the first half of a training."""
    return compressor.Pruner(
        model, torch.zeros(1, 3, 32, 32), budget=compressor.Budget(share, "macs"), schedule=compressor.Cubic(0.0, 0.5),
        optimizer=optimizer, total_steps=steps, prune_every=steps // 20, round_to=1, seed=seed, limits=limits(only),
        calibration=[x for x, _ in first_batches(found, CALIBRATION)], **how,
    )  # fmt: skip


def train(
    model: nn.Module,
    found: Data,
    epochs: int,
    seed: int,
    teacher: nn.Module | None = None,
    make_pruner: Callable[[nn.Module, Any, int], compressor.Pruner] | None = None,
    compiled: bool = False,
) -> None:
    """Train for so many epochs, also by a teacher's answers, or while it is pruned; writes the model."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(found.train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    pruning = make_pruner(model, optimizer, steps) if make_pruner else None
    run, asked = (torch.compile(each) if compiled and each is not None else each for each in (model, teacher))
    for _ in range(epochs):
        for x, y in found.train.batches(BATCH, shuffle=order, augment=Augmentation(), drop_last=True):
            loss_fn = F.cross_entropy
            if asked is not None:
                loss_fn = distilled(loss_fn, asked, x, weight=SHARE, temperature=TEMPERATURE)
            with pruning.observe(x) if pruning else nullcontext():
                loss = loss_fn(run(x), y)
            loss.backward()
            optimizer.step()
            if pruning:
                pruning.step()
            schedule.step()
            optimizer.zero_grad()


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method, with what relevance is ahead of it."""
    by_method = {method: {row["seed"]: row for row in cells if row["method"] == method} for method in METHODS}
    first = by_method["relevance"]
    rows = []
    for method, seen in by_method.items():
        if not seen:
            continue
        row: dict[str, Any] = {"method": method, "n": len(seen)}
        if method not in GRADUAL:
            row["cut"] = mean(each["cut"] for each in seen.values())
        values = [each["test"] for each in seen.values()]
        row |= {"test": mean(values), "sd": stdev(values) if len(values) > 1 else ""}
        apart = [first[seed]["test"] - seen[seed]["test"] for seed in first.keys() & seen.keys()]
        if method != "relevance" and len(apart) > 1:
            half = stats.t.ppf(0.975, len(apart) - 1) * stdev(apart) / math.sqrt(len(apart))
            row |= {"relevance is ahead by": mean(apart), "95 %": f"± {half:.2f}"}
        rows.append(row)
    return rows


if __name__ == "__main__":
    typer.run(main)
