"""Two ranks of DistributedDataParallel on CPUs against one process on the same whole batches: losses and cuts.

python benchmarks/ranks.py [--network resnet18] [--batch 64] [--steps 50]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from results_file import write
from torch import nn
from torch.distributed import destroy_process_group, group, init_process_group
from torch.multiprocessing import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import compressor
from compressor.training import models

RANKS = 2
CRITERIA = ("relevance", "l1", "random")
NOTE = (
    "CIFAR stem, random images, SGD, half of the parameters gone in cuts every tenth step, BatchNorm in "
    f"evaluation mode (else its statistics are of a rank's samples). {RANKS} ranks over gloo, one thread each, "
    "against one process with one thread on the same whole batches. `loss apart`: the largest relative difference "
    "over all steps between the ranks' mean loss and the one process's. Of float32 sums in another order the last "
    "bits differ, and near ties with them."
)


def main(
    network: Annotated[str, typer.Option(help="resnet18, or another with a CIFAR stem.")] = "resnet18",
    batch: Annotated[int, typer.Option(help="Images in a step, of all ranks together.")] = 64,
    steps: Annotated[int, typer.Option(help="Of the training.")] = 50,
) -> None:
    """Measure, write, and print where the table is."""
    rows = []
    for dtype in ("float32", "float64"):
        for criterion in CRITERIA:
            how = (network, batch, steps, criterion, dtype)
            with tempfile.TemporaryDirectory() as folder:
                spawn(as_rank, (Path(folder), how), RANKS)
                of_ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]
            alone = train(0, 1, *how)
            means = [sum(each) / RANKS for each in zip(*(each["losses"] for each in of_ranks), strict=True)]
            apart = [abs(mean / loss - 1) for mean, loss in zip(means, alone["losses"], strict=True)]
            row: dict[str, Any] = {"criterion": criterion, "precision": dtype, "steps": steps, "cuts": alone["cuts"]}
            row |= {"same channels left": all(each["left"] == alone["left"] for each in of_ranks)}
            row |= {"loss apart": max(apart), "ranks s": of_ranks[0]["seconds"], "one s": alone["seconds"]}
            rows.append(row)
            print(write(f"ranks-{network}", rows, NOTE), row, flush=True)


def as_rank(rank: int, folder: Path, how: tuple[Any, ...]) -> None:
    """Train as one of the ranks, and leave what came of it."""
    init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.save(train(rank, RANKS, *how), folder / f"{rank}.pt")
    destroy_process_group()


def train(
    rank: int, ranks: int, network: str, batch: int, steps: int, criterion: str, precision: str
) -> dict[str, Any]:
    """Return the loss of every step, and which channels are left, by the sums of the first convolution's weights."""
    torch.set_num_threads(1)
    dtype = getattr(torch, precision)
    model = models.build(network, classes=10, stem="cifar", seed=0).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # numbers that never train: they tell who is left
            if name.endswith(".bias") and parameter.dim() == 1 and "bn" in name:
                parameter.copy_(torch.arange(len(parameter)) * 1e-3)
                parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9)
    example = torch.zeros(1, 3, 32, 32, dtype=dtype)
    pruner = compressor.Pruner(
        model, example, criterion, 0.5, optimizer=optimizer, total_steps=steps, prune_every=10, compensate="none",
        process_group=group.WORLD if ranks > 1 else None,
    )  # fmt: skip
    run: nn.Module = DistributedDataParallel(model) if ranks > 1 else model
    draws, losses, cuts, began = torch.Generator().manual_seed(1), [], 0, perf_counter()
    for _ in range(steps):
        x = torch.randn(batch, 3, 32, 32, generator=draws).to(dtype).chunk(ranks)[rank]
        y = torch.randint(0, 10, (batch,), generator=draws).chunk(ranks)[rank]
        model.train()
        for module in model.modules():
            module.train(not isinstance(module, nn.BatchNorm2d))
        with pruner.observe(x) as mean:
            loss = mean(F.cross_entropy(run(x), y, reduction="none"))
        loss.backward()
        optimizer.step()
        if pruner.step():
            cuts += 1
            run = DistributedDataParallel(model) if ranks > 1 else model
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    left = {name: each.tolist() for name, each in model.named_parameters() if not each.requires_grad}
    return {"losses": losses, "left": left, "cuts": cuts, "seconds": perf_counter() - began}


if __name__ == "__main__":
    typer.run(main)
