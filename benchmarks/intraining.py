"""Pruning during training: how right the statistics are, what a step of them costs, and what comes of it.

    python benchmarks/intraining.py --part oracle|planted|cost|cut|accuracy [--only TEXT] [--again] [--minutes 60]
                                    [--processes 1]

* `oracle`: every estimator against enumerated truth, bias and variance.
* `planted`: planted channels among those that are selected.
* `cost`: time and memory of a relevance step over a plain step, and of a whole training over a dense one.
* `cut`: a cut of ResNet-18 in mid-training, optimizer included, Torch-Pruning beside it.
* `accuracy`: accuracy over sparsity for every criterion, three seeds.

Every row is written as soon as it is there. Rows of today, or else of yesterday, are kept, unless `--again`. What
measures no time may share the machine: `OMP_NUM_THREADS=1 ... --processes 2`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Annotated, Any

import torch
import typer
from results_file import earlier, write
from rich.progress import track

from compressor.errors import InputError, UnknownNameError

PARTS = ("oracle", "planted", "cost", "cut", "accuracy")
TIMED = ("cost", "cut")


def main(
    part: Annotated[str, typer.Option(help="One of: " + ", ".join(PARTS))],
    only: Annotated[
        str, typer.Option(help="Only cells whose name has this in it, or one of several with | between them.")
    ] = "",
    again: Annotated[bool, typer.Option(help="Measure cells anew that are there.")] = False,
    minutes: Annotated[float, typer.Option(help="Begin no new cell after so long.")] = 60.0,
    processes: Annotated[int, typer.Option(help="Measure so many cells at once; not for times.")] = 1,
) -> None:
    """Measure one part, row by row."""
    if part not in PARTS:
        raise UnknownNameError("part", part, PARTS)
    if part in TIMED and processes > 1:
        raise InputError(f"--part {part} measures times, which other processes would disturb: leave out --processes")
    what, end = importlib.import_module(f"intraining.{part}"), time.time() + 60 * minutes
    name = f"intraining-{part}" + ("-gpu" if torch.cuda.is_available() else "")  # other networks and sizes there
    cells = {key: cell for key, cell in what.cells().items() if any(part in key for part in only.split("|"))}
    if not cells:
        raise InputError(f"no cell of {part} has {only!r} in its name: there are {', '.join(what.cells())}")
    rows = [row for row in earlier(name) if not (again and row["cell"] in cells)]
    there = {row["cell"] for row in rows}
    missing = [each for each in cells if each not in there]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(measured, part, key, end) for key in missing]
        for done in track(as_completed(running), description=part, total=len(running)):
            rows += done.result()
            write(name, _sorted(rows, what.cells()), what.NOTE)
    print(write(name, _sorted(rows, what.cells()), what.NOTE))


def measured(part: str, key: str, end: float) -> list[dict[str, Any]]:
    """Return the row of one cell; none if it is too late to begin."""
    if time.time() > end:
        return []
    return [{"cell": key, **importlib.import_module(f"intraining.{part}").cells()[key]()}]


def _sorted(rows: list[dict[str, Any]], cells: Iterable[str]) -> list[dict[str, Any]]:
    places = {key: place for place, key in enumerate(cells)}
    return sorted(rows, key=lambda row: places.get(row["cell"], len(places)))


if __name__ == "__main__":
    typer.run(main)
