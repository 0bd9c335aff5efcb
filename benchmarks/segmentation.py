"""A U-Net on drawn shapes, pruned in a plain loop by its own loss: mean IoU, multiply-adds, latency in ONNX Runtime.

python benchmarks/segmentation.py [--seeds 2] [--epochs 20] [--methods relevance,l1,random]

Every method prunes twice: while it trains from random weights, in as many epochs as the dense network has, and from the
trained dense network in half as many more. Latencies come last, of all networks in turns: let nothing else run then.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from results_file import write
from shapes import CLASSES, draw
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.deploy import fvcore_macs, measure, open_session, session_runner

TRAIN, TEST, SIZE, BATCH, LR, SHARE = 480, 120, 64, 16, 2e-3, 0.5
CPU = torch.device("cpu")
NOTE = (
    f"{TRAIN} training and {TEST} test images of squares, circles and triangles, {SIZE} pixels square, drawn by "
    f"benchmarks/shapes.py; Adam, batches of {BATCH}, learning rate {LR:g} falling to 0 (cosine), cross-entropy; last "
    f"epoch. {SHARE:.0%} of the multiply-adds go by the usual schedule and allocation. IoU: mean over ground and "
    "shapes, test images, in percent."
)


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        one, two, four = width, 2 * width, 4 * width
        self.down1, self.down2, self.bottom = double(3, one), double(one, two), double(two, four)
        self.up2, self.up1 = nn.ConvTranspose2d(four, two, 2, 2), nn.ConvTranspose2d(two, one, 2, 2)
        self.join2, self.join1 = double(2 * two, two), double(2 * one, one)
        self.head = nn.Conv2d(one, 1 + len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        deep = self.bottom(F.max_pool2d(two, 2))
        up = self.join2(torch.cat([self.up2(deep), two], 1))
        scores: Tensor = self.head(self.join1(torch.cat([self.up1(up), one], 1)))
        return scores


def double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        layers += [nn.Conv2d(before, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    drawn = [draw(SIZE, rng) for _ in range(count)]
    images = torch.tensor(np.stack([each.image for each in drawn])).permute(0, 3, 1, 2).float() / 255
    return images, torch.tensor(np.stack([each.mask for each in drawn])).long()


def main(
    seeds: Annotated[int, typer.Option(help="Trainings of each.")] = 2,
    epochs: Annotated[int, typer.Option(help="Of the dense network.")] = 20,
    methods: Annotated[str, typer.Option(help="Comma list of criteria.")] = "relevance,l1,random",
) -> None:
    """Train, measure, write, and print where the tables are."""
    train_part, test_part = data(TRAIN, 0), data(TEST, 1)
    rows: list[dict[str, Any]] = []
    networks: dict[str, nn.Module] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        first = UNet()
        dense = copy.deepcopy(first)
        for method, start, length in [("dense", first, epochs)] + [
            (method, start, length)
            for start, length in ((first, epochs), (dense, epochs // 2))
            for method in methods.split(",")
        ]:
            model = dense if method == "dense" else copy.deepcopy(start)
            began = time.perf_counter()
            train(model, train_part, length, seed, None if method == "dense" else method)
            begins = "random weights" if start is first else "the trained network"
            rows.append(
                {
                    "method": method,
                    "begins with": begins,
                    "seed": seed,
                    "epochs": length,
                    "IoU": 100 * iou(model, test_part),
                    "MMACs": fvcore_macs(model.eval(), torch.zeros(1, 3, SIZE, SIZE)) / 1e6,
                    "params": sum(tensor.numel() for tensor in model.parameters()),
                    "seconds": time.perf_counter() - began,
                }
            )
            networks[f"{method} from {begins}, seed {seed}"] = model
            print(write("segmentation", rows, NOTE), flush=True)
    print(write("segmentation-latency", latencies(networks), "ONNX Runtime, one thread, one image, in turns."))


def train(model: nn.Module, part: tuple[Tensor, Tensor], epochs: int, seed: int, criterion: str | None) -> None:
    images, masks = part
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pruner = None
    if criterion:
        budget = compressor.Budget(SHARE, "macs")
        how: dict[str, Any] = {"optimizer": optimizer, "total_steps": steps, "seed": seed}
        pruner = compressor.Pruner(model, images[:1], criterion, budget, **how)
    model.train()
    for _ in range(epochs):
        for indices in torch.randperm(len(images), generator=generator).split(BATCH):
            if pruner:
                with pruner.observe(images[indices]):
                    loss = F.cross_entropy(model(images[indices]), masks[indices])
            else:
                loss = F.cross_entropy(model(images[indices]), masks[indices])
            loss.backward()
            optimizer.step()
            schedule.step()
            if pruner:
                pruner.step()
            optimizer.zero_grad()
    if pruner and not pruner.result().reached:
        raise SystemExit(f"{criterion}: {pruner.result().blocked}")


@torch.no_grad()
def iou(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    images, masks = part
    model.eval()
    found = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])
    each = [
        ((found == kind) & (masks == kind)).sum() / ((found == kind) | (masks == kind)).sum()
        for kind in range(1 + len(CLASSES))
    ]
    return float(torch.stack(each).mean())


def latencies(networks: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Export all networks and time them in turns, the first one twice."""
    images = torch.rand(1, 3, SIZE, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for number, (name, model) in enumerate(networks.items()):
            path = Path(folder) / f"{number}.onnx"
            compressor.export_onnx(model, path, images)
            runners[name] = session_runner(open_session(path), images, CPU)
        first = next(iter(networks))
        runners["again"] = session_runner(open_session(Path(folder) / "0.onnx"), images, CPU)
        taken = measure(runners, budget_s=60)
    return [
        {
            "network": name,
            "p50 ms": taken[name].p50_ms,
            "times as fast as dense": taken[first].p50_ms / taken[name].p50_ms,
            "n": taken[name].n,
            "A/A": taken["again"].p50_ms / taken[first].p50_ms,
        }
        for name in networks
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
