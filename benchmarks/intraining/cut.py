"""How long a cut of ResNet-18 in mid-training takes, weights, optimizer and folded means included."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch_pruning as tp
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

import compressor
from compressor.budget import Budget, CostModel, SelectionOptions, select
from compressor.relevance.relevance import Relevance
from compressor.training import models

NOTE = (
    "ResNet-18 for images of 32 x 32 on a CPU, after two relevance steps. `ours ms`: selection by relevance of 10 % of "
    "the parameters, cut of weights and optimizer state with means folded and the cut held against the trace, and the "
    "statistics narrowed. `Torch-Pruning ms`: dependency graph and one step of its pruner with random importance, 10 % "
    "of the channels; it leaves the optimizer alone, so a new one is made. In turns, medians. To reach: 100 ms."
)
ROUNDS = 5
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.001),
}
X, Y = torch.randn(8, 3, 32, 32), torch.arange(8)


def ours(optimizer_name: str) -> float:
    """Return the seconds of one cut of ours."""
    model = models.build("resnet18", classes=10, stem="cifar", seed=0)
    graph = compressor.trace(model, X[:1])
    relevance, optimizer = Relevance(graph), OPTIMIZERS[optimizer_name](model.train().parameters())
    for _ in range(2):
        relevance.loss(model, X, Y, F.cross_entropy).backward()
        optimizer.step()
        relevance.step()
    began = time.perf_counter()
    chosen = select(
        graph,
        relevance.scores(),
        Budget(0.1),
        costs=CostModel(graph),
        options=SelectionOptions("global", 8),
        normalise=False,
    )
    compressor.cut(graph, chosen.keep, optimizer, relevance.means())
    relevance.narrow(chosen.keep, graph)
    return time.perf_counter() - began


def theirs(optimizer_name: str) -> float:
    """Return the seconds of one cut of Torch-Pruning's."""
    model = copy.deepcopy(models.build("resnet18", classes=10, stem="cifar", seed=0)).train()
    began = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        model, X[:1], importance=tp.importance.RandomImportance(), pruning_ratio=0.1, ignored_layers=[model.fc]
    )
    pruner.step()
    OPTIMIZERS[optimizer_name](model.parameters())
    return time.perf_counter() - began


def measure(optimizer_name: str) -> dict[str, Any]:
    """Return one row."""
    pairs = [(ours(optimizer_name), theirs(optimizer_name)) for _ in range(ROUNDS)]
    mine, other = ([1e3 * pair[side] for pair in pairs] for side in (0, 1))
    return {
        "optimizer": optimizer_name, "n": ROUNDS, "threads": torch.get_num_threads(), "ours ms": median(mine),
        "ours, range": f"{min(mine):.0f}-{max(mine):.0f}", "Torch-Pruning ms": median(other),
        "Torch-Pruning, range": f"{min(other):.0f}-{max(other):.0f}",
    }  # fmt: skip


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what measures every row, by its name."""
    return {name: partial(measure, name) for name in OPTIMIZERS}
