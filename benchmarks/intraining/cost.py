"""What a relevance step costs over a plain step, in time and memory, and what a training that shrinks saves."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import compressor
from compressor.relevance import RelevanceConfig
from compressor.relevance.estimators import ESTIMATORS
from compressor.relevance.relevance import Relevance
from compressor.training import models

NOTE = (
    "ResNet-18 for images of 32 x 32, batch 512 on a GPU and 128 on a CPU, SGD with momentum, random images. `times a "
    "plain step`: median over rounds of the ratio of relevance steps to the plain steps beside them, A B A B, with the "
    "quartiles. Samples draw in every step of a round of four, since a control variate costs on one in four; `at the "
    "default pace` they draw in one step of eight, as in a training. Memory: peak of a process of its own for each "
    "side (GPU: allocated by PyTorch; CPU: resident, less what there was before the first step). To reach: soft and "
    "gate 1.05 on a GPU, 1.10 on a CPU, mixed 1.15, memory 1.10. `training`: 60 % of the MACs gone by half of it "
    "(cubic, from 10 %), over the dense training: 0.75."
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 512 if DEVICE == "cuda" else 128
ROUNDS, STEPS = (20, 4) if DEVICE == "cuda" else (5, 4)
TRAINING_STEPS = 400 if DEVICE == "cuda" else 60
Row = dict[str, Any]
Loss = Callable[[], Tensor]


class Side:
    """A model, its optimizer and one batch; steps with or without relevance."""

    def __init__(self, estimator: str | None, observe_every: int | None = 1) -> None:
        self.model = models.build("resnet18", classes=10, stem="cifar", seed=0).to(DEVICE)
        graph = compressor.trace(self.model, torch.zeros(1, 3, 32, 32, device=DEVICE))
        self.model.train()
        self.x = torch.randn(BATCH, 3, 32, 32, device=DEVICE)
        self.y = torch.randint(10, (BATCH,), device=DEVICE)
        self.optimizer = SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.relevance = (
            Relevance(graph, RelevanceConfig(estimator=estimator, observe_every=observe_every)) if estimator else None
        )

    def steps(self, count: int) -> float:
        """Take so many steps; give the seconds."""
        synchronize()
        began = time.perf_counter()
        for _ in range(count):
            if self.relevance:
                loss = self.relevance.loss(self.model, self.x, self.y, F.cross_entropy)
            else:
                loss = F.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            self.optimizer.step()
            if self.relevance:
                self.relevance.step()
            self.optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def step(estimator: str) -> Row:
    """Return the row of one estimator."""
    memory = [in_own_process(peak, name) for name in (None, estimator)]
    return {
        **ratio(f"{estimator} step", Side(estimator), STEPS),
        "memory MiB, plain": memory[0] / 2**20, "memory, times plain": memory[1] / memory[0],
    }  # fmt: skip


def paced(estimator: str) -> Row:
    """Return the row of one estimator at the pace of a training."""
    return ratio(f"{estimator} step at the default pace", Side(estimator, None), ESTIMATORS[estimator].observe_every)


def ratio(what: str, watched: Side, steps: int) -> Row:
    """Return what so many steps take over plain ones, in turns."""
    plain = Side(None)
    plain.steps(steps), watched.steps(steps)
    pairs = [(plain.steps(steps), watched.steps(steps)) for _ in range(ROUNDS)]
    ratios = sorted(after / before for before, after in pairs)
    return {
        "what": what, "device": DEVICE, "batch": BATCH, "threads": torch.get_num_threads(), "n": ROUNDS,
        "plain ms": 1e3 * median(before for before, _ in pairs) / steps, "times a plain step": median(ratios),
        "lower quartile": ratios[len(ratios) // 4], "upper quartile": ratios[-1 - len(ratios) // 4],
    }  # fmt: skip


def in_own_process(function: Callable[[str | None], float], argument: str | None) -> float:
    """Call a function in a fresh process: what was allocated before would hide a peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (argument,))


def peak(estimator: str | None) -> float:
    """Return the peak memory of a few steps, in bytes."""
    side = Side(estimator)
    before = resident("VmRSS")
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    side.steps(2)
    if DEVICE == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """Give this process's memory, now or at its peak, in bytes; what `getrusage` says includes the parent's (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(float(line.split()[1]) for line in lines if line.startswith(which))


def training(estimator: str) -> Row:
    """Return the row of a whole training that gets smaller, beside a dense one."""
    dense = Side(None)
    dense.steps(STEPS)
    seconds = dense.steps(TRAINING_STEPS)
    side = Side(None)
    pruner = compressor.Pruner(
        side.model,
        torch.zeros(1, 3, 32, 32, device=DEVICE),
        "relevance",
        compressor.Budget(0.6, "macs"),
        compressor.Cubic(0.1, 0.5),
        optimizer=side.optimizer,
        total_steps=TRAINING_STEPS,
        relevance=RelevanceConfig(estimator=estimator),
    )
    synchronize()
    began = time.perf_counter()
    for _ in range(TRAINING_STEPS):
        _pruning_step(pruner, side.model, side)
    synchronize()
    shrinking = time.perf_counter() - began
    return {
        "what": f"training, {estimator}", "device": DEVICE, "batch": BATCH, "threads": torch.get_num_threads(), "n": 1,
        "steps": TRAINING_STEPS, "MACs removed %": 100 * pruner.result().removed, "dense s": seconds,
        "times the dense training": shrinking / seconds,
    }  # fmt: skip


def _pruning_step(pruner: compressor.Pruner, model: nn.Module, side: Side) -> None:
    model.train()
    pruner.loss(side.x, side.y, F.cross_entropy).backward()
    side.optimizer.step()
    pruner.step()
    side.optimizer.zero_grad()


def cells() -> dict[str, Callable[[], Row]]:
    """Return what measures every row, by its name."""
    steps = {f"step {name} {DEVICE}": partial(step, name) for name in ESTIMATORS}
    pace = {f"pace gate {DEVICE}": partial(paced, "gate")}
    return steps | pace | {f"training gate {DEVICE}": partial(training, "gate")}
