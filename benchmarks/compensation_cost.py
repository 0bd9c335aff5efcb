"""What compensation costs: milliseconds of one cut of ResNet-18, half of every group, on one CPU thread.

python benchmarks/compensation_cost.py
"""

from __future__ import annotations

import copy
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torchvision
from results_file import write

import compressor
from compressor.surgery import input_means, input_moments

RUNS, IMAGES, BATCH = 9, 2048, 64
NOTE = (
    f"ResNet-18 on 32x32 images, one thread, median of {RUNS} in turns, smallest and largest. `statistics`: seconds "
    f"for means, or means and covariances, over {IMAGES} images, once for each cut."
)


def main() -> None:
    """Measure, write, and print where the table is."""
    torch.set_num_threads(1)
    base = torchvision.models.resnet18(num_classes=10).eval()
    batches = list(torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(BATCH))
    known: dict[str, Any] = {"none": None}
    seconds = {"none": 0.0}
    for name, gather in (("mean", input_means), ("linear", input_moments)):
        graph = compressor.trace(base, batches[0][:1])
        start = perf_counter()
        known[name] = gather(graph, batches)
        seconds[name] = perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(RUNS):
        for name, each in known.items():
            graph = compressor.trace(copy.deepcopy(base), batches[0][:1])
            keep = {group.name: torch.arange(0, group.size, 2) for group in graph.groups}
            start = perf_counter()
            compressor.cut(graph, keep, means=each)
            times[name].append(1e3 * (perf_counter() - start))
    rows = [
        {
            "compensate": name,
            "cut ms": median(each),
            "least": min(each),
            "most": max(each),
            "statistics s": seconds[name],
        }
        for name, each in times.items()
    ]
    print(write("compensation-cost", rows, NOTE))


if __name__ == "__main__":
    main()
