"""Planted truths: a trained network of which half the channels are copies, noise or disconnected. Who finds them?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.budget import Budget, CostModel, SelectionOptions, select
from compressor.criteria.registry import score
from compressor.criteria.snapshot import Snapshot
from compressor.relevance import RelevanceConfig
from compressor.relevance.estimators import ESTIMATORS
from compressor.relevance.relevance import Relevance
from compressor.surgery.compensation import input_means
from compressor.training.data.sources import load_data

NOTE = (
    "Two convolutions and a Linear, trained on digits, then every hidden layer is made twice as wide: a third of the "
    "new channels are disconnected (no consumer reads them), a third noise (random filters, read with a fiftieth of a "
    "usual weight), a third copies (of a trained channel, which hands a tenth of its weight on to the copy). Training "
    "goes on while relevance watches; then half of all channels are selected. `found %`: the share of planted channels "
    "among the selected ones; 50 is chance. To reach: 95. `reliability`: rank correlation of two halves of the steps. "
    "`leave one out`: the true effect of each channel, from the loss of all training images with it cut, mean folded. "
    "Relevance draws at its default pace, one step in eight where gate gradients tell."
)
STEPS, SEEDS, BATCH = 300, 3, 64
EXACT = "leave one out"
Row = dict[str, Any]


def network(width: int) -> nn.Sequential:
    """Return two convolutions and a Linear, for images of 3 x 16 x 16."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AvgPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 10))


def batches(seed: int, steps: int) -> Any:
    """Give so many batches of digits, epoch after epoch."""
    data, generator, left = load_data("digits", image_size=16), torch.Generator().manual_seed(seed), steps
    while left:
        for batch in data.train.batches(BATCH, shuffle=generator):
            if len(batch[0]) == BATCH and left:
                left -= 1
                yield batch


@cache
def trained(seed: int) -> nn.Sequential:
    """Return the network that is to be found again."""
    torch.manual_seed(seed)
    model = network(12).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in batches(seed, 400):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def planted(seed: int) -> nn.Sequential:
    """Return the trained network with as many planted channels behind its own in every hidden layer."""
    small, wide = trained(seed), network(24).train()
    with torch.no_grad():
        for producer, consumer, spread in ((0, 4, 1), (4, 9, 4)):
            _widen(small, wide, producer, consumer, spread)
        wide[9].bias.copy_(small[9].bias)
    return wide


def _widen(small: nn.Sequential, wide: nn.Sequential, producer: int, consumer: int, spread: int) -> None:
    """Fill the hidden layer behind `producer`; its channels take `spread` places each in the consumer's input."""
    size, inputs = small[producer].weight.shape[:2]
    third = size // 3
    disconnected, noise = torch.arange(size, size + third), torch.arange(size + third, size + 2 * third)
    copies = torch.arange(size + 2 * third, 2 * size)
    originals = copies - size
    filters = wide[producer].weight  # from channels planted before it reads what was written for them
    filters[noise] = small[producer].weight.std() * torch.randn_like(filters[noise])
    filters[:size, :inputs] = small[producer].weight
    filters[copies] = filters[originals]
    for name in ("bias", "weight", "running_mean", "running_var"):
        for layer in (producer, producer + 1):
            old, new = getattr(small[layer], name, None), getattr(wide[layer], name, None)
            if old is not None and new is not None and new.dim() == 1:
                new[:size], new[copies] = old, old[originals]
    own = small[consumer].weight.view(len(small[consumer].weight), size, spread, -1)
    read = wide[consumer].weight.view(len(wide[consumer].weight), 2 * size, spread, -1)
    rows = len(own)
    read[:rows, :size] = own
    read[:rows, originals], read[:rows, copies] = 0.9 * own[:, originals], 0.1 * own[:, originals]
    read[:, noise] = own.std() / 50 * torch.randn_like(read[:, noise])
    read[:, disconnected] = 0.0


def ranking(name: str, model: nn.Module, seed: int) -> tuple[dict[str, Tensor], compressor.ChannelGraph, Row]:
    """Return the scores after so many steps of training, the graph, and the least reliability of a group, if known."""
    graph = compressor.trace(model, torch.zeros(1, 3, 16, 16))
    model.train()
    relevance = (
        Relevance(graph, RelevanceConfig(estimator=name, half_life=STEPS), seed=seed) if name in ESTIMATORS else None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    for x, y in batches(seed + 100, STEPS):
        loss = relevance.loss(model, x, y, F.cross_entropy) if relevance else F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if relevance:
            relevance.step()
        optimizer.zero_grad()
    if relevance:
        return relevance.scores(), graph, {"reliability": min(relevance.reliability().values())}
    if name == EXACT:
        return left_out(model, graph), graph, {}
    return score(name, graph.groups, Snapshot.from_model(model, torch.Generator().manual_seed(seed))), graph, {}


@torch.no_grad()
def left_out(model: nn.Module, graph: compressor.ChannelGraph) -> dict[str, Tensor]:
    """Return what the mean loss rises by when one channel is cut, `(C,)` by group."""
    x, y = next(iter(load_data("digits", image_size=16).train.batches(10**6)))
    means, model = input_means(graph, [x]), model.eval()
    whole = float(F.cross_entropy(model(x), y))
    scores = {name: torch.zeros(size) for name, size in graph.sizes().items()}
    for name, effects in scores.items():
        for channel in range(len(effects)):
            smaller = copy.deepcopy(model)
            keep = [other for other in range(len(effects)) if other != channel]
            compressor.cut(compressor.trace(smaller, x[:1]), {name: keep}, means=means)
            effects[channel] = float(F.cross_entropy(smaller(x), y)) - whole
    return scores


def measure(name: str, seed: int) -> Row:
    """Return one row."""
    scores, graph, reliability = ranking(name, copy.deepcopy(planted(seed)), seed)
    watched = name in ESTIMATORS or name == EXACT
    row: Row = {"criterion": name, "seed": seed, "steps": STEPS, **reliability}
    for allocate in ("global", "uniform"):
        chosen = select(
            graph,
            scores,
            Budget(0.5, "channels"),
            costs=CostModel(graph),
            options=SelectionOptions(allocate, 1),
            normalise=not watched,
        )
        gone = {group.name: set(range(group.size)) - set(chosen.keep[group.name].tolist()) for group in graph.groups}
        hits = sum(len([c for c in gone[group.name] if c >= group.size // 2]) for group in graph.groups)
        row[f"found %, {allocate}"] = 100 * hits / sum(map(len, gone.values()))
    return row


def cells() -> dict[str, Callable[[], Row]]:
    """Return what measures every row, by its name."""
    names = [*ESTIMATORS, EXACT, "l1", "random"]
    return {f"{name} {seed}": partial(measure, name, seed) for name in names for seed in range(SEEDS)}
