"""Accuracy over sparsity, for every criterion under the same schedule: digits, and CIFAR-10, reduced on a CPU.

A cell is one training: criterion, sparsity, seed, data. Cells come sparsity by sparsity, the middle one first, so that
a run that is stopped early has compared all criteria.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchvision.models.resnet import BasicBlock

import compressor
from compressor.budget.costs import CostModel
from compressor.relevance import RelevanceConfig
from compressor.relevance.estimators import ESTIMATORS
from compressor.sparse import SparseConfig
from compressor.sparse.regrowth import METHODS
from compressor.sparse.training import SparseTraining
from compressor.training import load_data, models
from compressor.training.config import TrainingConfig
from compressor.training.data.sources import Data
from compressor.training.data.splits import stratified_split
from compressor.training.evaluation import evaluate
from compressor.training.hooks import PlainStep
from compressor.training.loop import train

NOTE = (
    "Share of the parameters removed while training, cubic from 10 % to 65 % of it (`set` and `rigl`: channels, masked "
    "from the beginning and cut at the end); accuracy on the test part after equally many epochs. `dense` is trained "
    "alike. `relevance-...` ranks all channels together, per parameter (`--allocate global`); `relevance-gate, local` "
    "(the default), `l1`, `euclidean`, `random` and `magnitude` take the same share of every group. With a GPU: "
    "ResNet-18 (CIFAR stem) and all of CIFAR-10, batches of 512 in bfloat16. On a CPU: a residual network of three "
    "blocks (32, 64, 128 channels), 16 x 16 "
    "digits, and 5,000 images of CIFAR-10; it is far from trained to the end, so that only differences count."
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CRITERIA: dict[str, dict[str, Any]] = {
    "dense": {},
    "random": {},
    **{
        f"relevance-{name}": {"criterion": "relevance", "relevance": RelevanceConfig(name), "allocate": "global"}
        for name in ESTIMATORS
    },
    "relevance-gate, local": {"criterion": "relevance"},
    "l1": {},
    "euclidean": {},
    **{name: {} for name in METHODS},
}
VARIANTS: dict[str, dict[str, Any]] = {  # what the defaults are chosen from
    "l1, global": {"criterion": "l1", "allocate": "global"},
    "relevance-gate, every step": {
        "criterion": "relevance",
        "relevance": RelevanceConfig(observe_every=1),
        "allocate": "global",
    },
}
BY_MACS = (
    "random",
    "l1",
    "relevance-gate",
    "relevance-gate, local",
)  # 60 % of the multiply-adds instead of the parameters
SPARSITIES, SEEDS = (0.6, 0.8, 0.4), 3
EPOCHS = {"cifar10": 16 if DEVICE == "cuda" else 10, "digits": 20}
# On a GPU bfloat16 and channels-last, and batches that fill it, with a learning rate to go with them.
HOW: dict[str, Any] = {"batch_size": 64, "lr": 0.05}
if DEVICE == "cuda":
    HOW = {"batch_size": 512, "lr": 0.3, "amp": True, "channels_last": True}
ROUND_TO = 8 if DEVICE == "cuda" else 2
CIFAR = Path(".data/cifar10")  # train/CLASS/*.png and test/CLASS/*.png, or torchvision's own files in .data
Row = dict[str, Any]


@cache
def data(name: str) -> Data:
    """Return a data set, of CIFAR-10 a tenth where there is no GPU."""
    if name == "digits":
        return load_data("digits", image_size=32 if DEVICE == "cuda" else 16)
    whole = load_data(f"imagefolder:{CIFAR}" if CIFAR.is_dir() else "cifar10", image_size=32)
    if DEVICE == "cuda":
        return whole
    return replace(whole, train=stratified_split(whole.train, 0.9, 0, whole.classes)[0])


def network(classes: int, seed: int) -> nn.Module:
    """Return the network that the machine can train many times."""
    if DEVICE == "cuda":
        return models.build("resnet18", classes=classes, stem="cifar", seed=seed)
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes)]
    return nn.Sequential(*stem, BasicBlock(32, 32), narrower(32, 64), narrower(64, 128), *head)


def narrower(inside: int, outside: int) -> nn.Module:
    """Return a residual block that halves the image."""
    shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, 2, bias=False), nn.BatchNorm2d(outside))
    return BasicBlock(inside, outside, 2, shortcut)


def hook(
    criterion: str, budget: compressor.Budget, seed: int, example: torch.Tensor, epoch_steps: int
) -> Callable[..., Any]:
    """Return what takes part in the training steps."""

    def make(model: nn.Module, optimizer: Optimizer, total_steps: int) -> Any:
        if criterion == "dense":
            return PlainStep(model, optimizer, total_steps)
        if criterion in METHODS:
            extra = {"set": {"prune_every": epoch_steps}, "rigl": {"prune_every": max(1, total_steps // 20)}}.get(
                criterion, {}
            )
            return SparseTraining(
                model,
                example,
                criterion,
                budget,
                optimizer=optimizer,
                total_steps=total_steps,
                round_to=ROUND_TO,
                seed=seed,
                **extra,
                config=SparseConfig(granularity="channel"),
            )
        how = {"criterion": criterion, **(CRITERIA | VARIANTS)[criterion]}
        return compressor.Pruner(
            model, example, budget=budget, optimizer=optimizer, total_steps=total_steps, round_to=ROUND_TO, seed=seed,
            **how,
        )  # fmt: skip

    return make


def counts(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Return the numbers of parameters and multiply-adds."""
    dense = CostModel(compressor.trace(model, example)).dense
    return {"params": dense["params"], "macs": dense["macs"]}


def measure(name: str, criterion: str, sparsity: float, seed: int, what: str = "params") -> Row:
    """Train once, and look at the test part."""
    found, batch = data(name), HOW["batch_size"]
    model = network(len(found.classes), seed).to(DEVICE)
    config = TrainingConfig(EPOCHS[name], **HOW, seed=seed, device=DEVICE)
    example = torch.zeros(1, *found.image_shape, device=DEVICE)
    before, budget = counts(model, example), compressor.Budget(sparsity, what)
    history = train(model, found, config, hook(criterion, budget, seed, example, len(found.train) // batch))
    after = counts(model, example)
    return {
        "data": name, "criterion": criterion, "asked %": 100 * sparsity, "seed": seed, "epochs": EPOCHS[name],
        "budget": what, "params removed %": 100 * (1 - after["params"] / before["params"]),
        "MACs removed %": 100 * (1 - after["macs"] / before["macs"]),
        "test accuracy %": 100 * evaluate(model, found.test, device=DEVICE).accuracy,
        "seconds": sum(epoch["seconds"] for epoch in history.epochs),
    }  # fmt: skip


def cells() -> dict[str, Callable[[], Row]]:
    """Return what measures every row, by its name."""
    found: dict[str, Callable[[], Row]] = {}
    for sparsity in SPARSITIES:
        for name in EPOCHS:
            variants = VARIANTS if (name, sparsity) == ("cifar10", 0.8) else {}
            for seed in range(SEEDS):
                for criterion in CRITERIA | variants:
                    share = 0.0 if criterion == "dense" else sparsity
                    key = f"{name} {criterion} {share:g} {seed}"
                    found.setdefault(key, partial(measure, name, criterion, share, seed))
    for criterion in BY_MACS:
        for seed in range(SEEDS):
            key = f"cifar10 {criterion} 0.6 of the MACs {seed}"
            found[key] = partial(measure, "cifar10", criterion, 0.6, seed, "macs")
    return found
