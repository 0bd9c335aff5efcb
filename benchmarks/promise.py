"""Promise 1 on the reference models: a cut model equals the masked one, for every criterion, half of all channels.

Double precision, random weights, BatchNorm statistics that are not trivial. The oracle zeroes the consumers' weights in
a copy of the whole model and never sees the surgery. The first column of figures must be at most 1e-12.

    python benchmarks/promise.py [--models resnet18,vgg16] [--size 64]
"""

from __future__ import annotations

import copy
import time
from typing import Annotated

import torch
import torchvision
import typer
from results_file import write
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.budget import Budget, CostModel, SelectionOptions, select
from compressor.criteria import score
from compressor.relevance import Relevance
from compressor.surgery import mask_channels, removed_channels

MODELS = "resnet18,vgg16,vgg16_bn,mobilenet_v2,densenet121,googlenet"
CRITERIA = ("l1", "l2", "euclidean", "geometric_median", "bn_scale", "taylor", "random", "relevance")


def built(name: str) -> nn.Module:
    """Return the model in double precision, with statistics and scales that are not trivial."""
    torch.manual_seed(0)
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **extra).double().eval()
    with torch.no_grad():
        for key, tensor in [*model.named_buffers(), *model.named_parameters()]:
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(torch.empty_like(tensor).uniform_(-0.1, 0.1))
    return model


def scores(name: str, model: nn.Module, graph: compressor.ChannelGraph, size: int) -> dict[str, Tensor]:
    """Score every group; criteria that need gradients or observations get two batches of random images."""
    x, y = torch.randn(4, 3, size, size, dtype=torch.float64), torch.randint(10, (4,))
    if name == "relevance":
        observer = Relevance(graph, seed=0)
        observer.loss(model.train(), x, y, F.cross_entropy).backward()
        observer.step()
        model.zero_grad()
        model.eval()
        return observer.scores()
    if name == "taylor":
        F.cross_entropy(model(x), y).backward()
    snapshot = compressor.Snapshot.from_model(model, torch.Generator().manual_seed(0))
    found = score(name, graph.groups, snapshot)
    model.zero_grad()
    return found


def measure(model_name: str, criterion: str, size: int) -> dict[str, object]:
    """Cut half of all channels and hold the result against the masked copy."""
    model = built(model_name)
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    start = time.perf_counter()
    graph = compressor.trace(model, x)
    traced = time.perf_counter()
    found = scores(criterion, model, graph, size)
    selection = select(
        graph, found, Budget(0.5, "channels"), costs=CostModel(graph), options=SelectionOptions("global", 1)
    )
    oracle = copy.deepcopy(graph)
    mask_channels(oracle, {name: removed_channels(graph[name], keep) for name, keep in selection.keep.items()})
    before = time.perf_counter()
    compressor.cut(graph, selection.keep)
    done = time.perf_counter()
    with torch.no_grad():
        expected, result = oracle.model.eval()(x), model.eval()(x)
    error = float((result - expected).abs().max() / expected.abs().max())
    return {
        "model": model_name, "criterion": criterion, "error against masking": error, "holds": error <= 1e-12,
        "channels removed": selection.removed, "groups": len(graph.groups), "frozen": len(graph.frozen),
        "trace ms": 1e3 * (traced - start), "cut ms": 1e3 * (done - before),
    }  # fmt: skip


def main(models: Annotated[str, typer.Option()] = MODELS, size: Annotated[int, typer.Option()] = 64) -> None:
    """Measure and write the table."""
    pairs = [(m, c) for m in models.split(",") for c in CRITERIA if not (m == "vgg16" and c == "bn_scale")]
    rows = [measure(m, c, size) for m, c in track(pairs, description="cutting")]
    note = "VGG-16 has no BatchNorm, so `bn_scale` does not apply to it. Times are of one run each, for orientation."
    print(write("promise", rows, note))
    worst = max(float(str(row["error against masking"])) for row in rows)
    print(f"largest error {worst:.1e}, {sum(bool(row['holds']) for row in rows)} of {len(rows)} hold")
    raise typer.Exit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
