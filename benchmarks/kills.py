"""Kill a run at random moments and resume it: is what comes out what an undisturbed run gives?

    python benchmarks/kills.py [--kills 40] [--seed 0] [--recipe "--ema 0.99 --distill 0.5 --checkpoint-every 5"]

A run of `compress` on the digits, with its own small network and cuts in training, is killed by SIGKILL at a moment
drawn uniformly over the time that it takes, and resumed; again and again, until it finishes. Then the next one begins.
Compared are all records of the training but their seconds, and the bits of the pruned model.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from results_file import write
from rich.progress import track
from torch import nn

import compressor

NOTE = "`kills` of one run, at what share of an undisturbed run's time; `equal`: records but seconds, and every weight."
OPTIONS = "--model kills:network --data digits --epochs 4 --prune-every 10 --batch-size 32 --round-to 1 --sparsity 0.5"


def network(num_classes: int) -> nn.Module:
    """Return a network that trains in seconds."""
    widths = (3, 16, 24, 32)
    blocks = [
        part
        for before, after in pairwise(widths)
        for part in (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def start(folder: Path, recipe: str, resume: bool) -> subprocess.Popen[bytes]:
    """Start the run, or go on with it."""
    words = ["--resume"] if resume else [*OPTIONS.split(), *recipe.split()]
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    command = [sys.executable, "-m", "compressor", *words, "--out", str(folder)]
    return subprocess.Popen(command, env=environment, cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the records without their seconds, and the weights of the pruned model."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]
    model = compressor.load(folder / "model.safetensors", factory=lambda: network(10))
    return records, {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def finished(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a run; a failure is shown."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(said.decode())


def main(
    kills: Annotated[int, typer.Option(help="how many times in all")] = 40,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
    recipe: Annotated[str, typer.Option(help="more options of the run")] = "",
) -> None:
    """Measure, write, and print what was equal."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        finished(start(Path(scratch) / "whole", recipe, resume=False))
        takes = time.perf_counter() - began
        expected = outcome(Path(scratch) / "whole")
        rows: list[dict[str, Any]] = []
        shares: list[float] = []
        for _ in track(range(kills)):
            folder = Path(scratch) / f"run{len(rows)}"
            process = start(folder, recipe, resume=(folder / "config.toml").exists())
            share = moments.random()
            try:
                process.wait(share * takes)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                shares.append(round(share, 2))
            finished_early = process.wait() == 0
            if finished_early:
                rows.append({"run": len(rows), "kills": shares, "equal": outcome(folder) == expected})
                shares = []
        folder = Path(scratch) / f"run{len(rows)}"
        finished(start(folder, recipe, resume=(folder / "config.toml").exists()))
        rows.append({"run": len(rows), "kills": shares, "equal": outcome(folder) == expected})
    write("kills-recipe" if recipe else "kills", rows, NOTE)
    typer.echo(
        f"{sum(len(row['kills']) for row in rows)} kills, {sum(row['equal'] for row in rows)} of {len(rows)} equal"
    )


if __name__ == "__main__":
    typer.run(main)
