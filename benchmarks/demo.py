"""The main job on the embedded data, several seeds: accuracy of the pruned model against the dense one, and latency.

The job is the one that `make demo` runs: ResNet-18 on digits, 60 % of the parameters removed while training, the dense
reference trained equally long. To reach: accuracy within 1.0 point, onnxruntime's median latency at batch 1 below the
dense model's, everything within 8 minutes on two cores.

    python benchmarks/demo.py [--seeds 3] [--criteria relevance,random,l1]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from results_file import write
from rich.progress import track

from compressor import job
from compressor.job import Settings


def measure(criterion: str, seed: int) -> dict[str, Any]:
    """Run the job once in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(criterion=criterion, when="during", seed=seed, out=str(Path(folder) / "run"))
        began = time.perf_counter()
        report = job.run(settings)
        seconds = time.perf_counter() - began
    dense, pruned = report.dense, report.pruned
    onnx = {each.model: each for each in report.timings if each.backend == "onnxruntime" and each.batch_size == 1}
    return {
        "criterion": criterion, "seed": seed, "dense accuracy %": 100 * dense.accuracy,
        "pruned accuracy %": 100 * pruned.accuracy, "difference": 100 * (pruned.accuracy - dense.accuracy),
        "params removed %": 100 * (1 - pruned.params / dense.params),
        "MACs removed %": 100 * (1 - pruned.macs / dense.macs),
        "ONNX p50 ms dense": onnx["dense"].p50_ms, "ONNX p50 ms pruned": onnx["pruned"].p50_ms,
        "seconds": seconds,
    }  # fmt: skip


def main(seeds: Annotated[int, typer.Option()] = 3, criteria: Annotated[str, typer.Option()] = "relevance") -> None:
    """Measure and write the table."""
    runs = [(criterion, seed) for criterion in criteria.split(",") for seed in range(seeds)]
    rows = [measure(*each) for each in track(runs, description="jobs")]
    print(write("demo", rows, "One row a run; 450 test images, so one image is 0.22 points."))


if __name__ == "__main__":
    typer.run(main)
