"""Our training loop against a bare one, and its steps while channels go: seconds a step, interleaved in one run.

python benchmarks/training_speed.py [--network resnet18] [--batch 128] [--rounds 3] [--device cpu]
"""

from __future__ import annotations

import copy
import itertools
import resource
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from results_file import write
from torch import nn
from torch.nn import functional as F

import compressor
from compressor.training import Data, Split, TrainingConfig, models, train
from compressor.training.data.images import Resident
from compressor.training.optimizers import make_optimizer

NOTE = (
    "CIFAR stem, 32x32 images of random bytes, float32 (with --amp bfloat16, channels-last). `bare loop`: the same "
    "model, optimizer and batches, already "
    "normalised, without augmentation, records or checkpoints. `bare loop again`: the same once more, what noise is. "
    "All in turns, every other round backwards; the first step of each turn is not counted on a CPU, 20 on a GPU."
)


MEMORY = (
    "What autograd saves in a forward pass in training mode, every memory once, without weights; of one image. A "
    "step needs as much for each image of its batch (or of one part of it, with --accumulate), the last column once."
)


def main(
    network: Annotated[str, typer.Option(help="resnet18, or another with a CIFAR stem.")] = "resnet18",
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 128,
    rounds: Annotated[int, typer.Option(help="Turns of every row.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    counted: Annotated[int, typer.Option("--steps", help="Counted steps of each turn.")] = 3,
    amp: Annotated[bool, typer.Option(help="bfloat16 and channels-last, in both loops.")] = False,
) -> None:
    """Measure, write, and print where the table is."""
    torch.set_num_threads(1)
    unmeasured = 1 if device == "cpu" else 20  # a GPU has algorithms to choose first
    data = images(batch * (unmeasured + counted))
    config = TrainingConfig(epochs=1, batch_size=batch, augment=False, device=device, amp=amp, channels_last=amp)
    dense = models.build(network, classes=10, stem="cifar", seed=0)
    networks = {0.0: dense} | {share: without(dense, share) for share in (0.25, 0.5, 0.75)}
    name = f"{network}-{device}-{batch}{'-amp' if amp else ''}"
    print(write(f"training-memory-{name}", memory(networks, batch, device, amp), MEMORY))
    turns: dict[str, Callable[[], list[float]]] = {
        "bare loop": lambda: bare(copy.deepcopy(dense), data, config),
        "bare loop again": lambda: bare(copy.deepcopy(dense), data, config),
        "bare loop, optimizer not fused": lambda: bare(copy.deepcopy(dense), data, config, is_fused=False),
        "ours": lambda: ours(copy.deepcopy(dense), data, config),
        "ours, augmented": lambda: ours(copy.deepcopy(dense), data, TrainingConfig(**vars(config) | {"augment": True})),
    }
    for share, model in networks.items():
        if share:
            turns[f"ours, {share:.0%} of the MACs gone"] = lambda model=model: ours(copy.deepcopy(model), data, config)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for loop in list(turns)[:: -1 if number % 2 else 1]:
            seconds[loop] += turns[loop]()[unmeasured - 1 :]
            print(number, loop, [round(each, 3) for each in seconds[loop][-3:]], flush=True)
    base = median(seconds["bare loop"])
    rows: list[dict[str, Any]] = [
        {
            "loop": loop,
            "s a step": median(each),
            "least": min(each),
            "most": max(each),
            "n": len(each),
            "images/s": batch / median(each),
            "speed over the bare loop": base / median(each),
        }
        for loop, each in seconds.items()
    ]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    said = f"{NOTE} Batches of {batch}. Peak memory of the process: {most:.0f} MiB"
    if device != "cpu":
        said += f"; of the GPU: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    print(write(f"training-speed-{name}", rows, f"{said}."))


def memory(networks: dict[float, nn.Module], batch: int, device: str, amp: bool) -> list[dict[str, Any]]:
    """Return what a step keeps for its backward pass of every image, beside weights, gradients and momentum."""
    return [
        {
            "MACs gone": f"{share:.0%}",
            "kept of an image, MiB": kept(copy.deepcopy(model).to(device), batch, amp) / batch / 2**20,
            "weights, gradients, momentum, MiB": 3 * sum(each.numel() for each in model.parameters()) * 4 / 2**20,
        }
        for share, model in networks.items()
    ]


def kept(model: nn.Module, batch: int, amp: bool) -> int:
    """Return the bytes that autograd saves in one forward pass: every memory once, and no weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def look(saved: torch.Tensor) -> torch.Tensor:
        memory = saved.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        return saved

    x = torch.zeros(batch, 3, 32, 32, device=next(model.parameters()).device)
    hooks = torch.autograd.graph.saved_tensors_hooks(look, lambda saved: saved)
    with hooks, torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        outputs = model.train()(x)
    total = sum(found.values())
    del outputs  # until here all was alive that it was made of, and no address came twice
    return total


def images(count: int) -> Data:
    """Return random images with random classes; few to validate on."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        pixels = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Split.from_arrays(Resident(pixels), torch.randint(0, 10, (n,), generator=generator))

    data = Data("random", tuple("0123456789"), (3, 32, 32), split(count), split(10), split(10))
    return data.normalised((127.5,) * 3, (64.0,) * 3)


def without(dense: nn.Module, share: float) -> nn.Module:
    """Return the model less a share of its MACs."""
    model = copy.deepcopy(dense)
    compressor.prune(model, torch.zeros(1, 3, 32, 32), "l1", compressor.Budget(share, "macs"), compensate="none")
    return model


def bare(model: nn.Module, data: Data, config: TrainingConfig, *, is_fused: bool = True) -> list[float]:
    """Return the seconds of every counted step of the loop that everybody writes."""
    batches = list(data.train.batches(config.batch_size, device=config.device))
    order = torch.channels_last if config.channels_last else torch.contiguous_format
    batches = [(x.contiguous(memory_format=order), y) for x, y in batches]
    model.to(config.device, memory_format=order).train()
    optimizer = make_optimizer(model, config)
    for parameters in optimizer.param_groups:
        parameters["fused"] = is_fused
    ends = []
    for x, y in batches:
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.amp):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(now(config.device))
    return steps(ends)


def ours(model: nn.Module, data: Data, config: TrainingConfig) -> list[float]:
    """Return the seconds of every counted step of `compressor.training.train`."""
    ends: list[float] = []
    train(model, data, config, on_progress=lambda done, total: ends.append(now(config.device)))
    return steps(ends)


def now(device: str) -> float:
    """Return the time at which everything asked of the device so far is done."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return perf_counter()


def steps(ends: list[float]) -> list[float]:
    """Return the time between ends of steps."""
    return [after - before for before, after in itertools.pairwise(ends)]


if __name__ == "__main__":
    typer.run(main)
