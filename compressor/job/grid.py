"""A grid of runs: criteria by sparsities by seeds, each a run folder of its own, compared at the end.

    Grid({"model": "resnet18"}, ("relevance", "l1"), (0.4, 0.6), seeds=2, out="runs/study")    # 8 cells
    runs/study/relevance-0.4-seed0/  ...  runs/study/compare.html

Cells are independent: any number of processes, on any number of machines that share the folder, may work on one grid.
A finished cell is never run again, and one that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from compressor import report
from compressor._utils import StopRequest
from compressor.deploy import describe_machine
from compressor.errors import CompressorError, InputError, RangeError, RunFolderError
from compressor.job.checks import idle_options
from compressor.job.folder import is_run_folder, resumed
from compressor.job.main_job import run
from compressor.job.option_table import PUBLISHED
from compressor.job.options import as_words
from compressor.job.settings import Settings

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)

_DONE, _FAILED, _STOPPED, _BUSY = 0, 1, 75, 76  # exit codes of a cell's process


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        options: of every run, by name as typed; what only some criteria know is left out for the others.
        criteria, sparsities: each with each.
        seeds: how many, from 0 on.
        out: the folder of the grid.

    Raises:
        InputError: nothing to compare, or an option that has no effect in any cell.
        UnknownNameError, RangeError: as for `Settings`.
    """

    options: Mapping[str, Any]
    criteria: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: int
    out: str

    def __post_init__(self) -> None:
        """Check all cells before anything runs."""
        for name, values in (("criteria", self.criteria), ("sparsity", self.sparsities)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"--{name} {','.join(map(str, values))}: give each value once, separated by commas")
        if self.seeds < 1:
            raise RangeError("seeds", self.seeds, "1, 2, 3, ...")
        idle = set(self.options)
        for criterion in self.criteria:
            idle &= self._idle(criterion)
        if idle:
            listed = ", ".join(f"--{name}" for name in sorted(idle))
            raise InputError(f"{listed} has no effect with any of {', '.join(self.criteria)}: leave it out")
        for name in ("weights", "teacher"):
            path = self.options.get(name)
            if path and path != PUBLISHED and not Path(path).is_file():
                raise InputError(f"--{name} {path}: there is no such file")
        self.cells()

    def _common(self) -> dict[str, Any]:
        # One schedule for all, or what differs would be when channels go and not which.
        return {"when": "during", **self.options}

    def _idle(self, criterion: str) -> set[str]:
        """Return the options that have no effect with a criterion."""
        values = {field.name: field.default for field in dataclasses.fields(Settings)}
        values |= {name.replace("-", "_"): value for name, value in self._common().items()}
        return {name for name in self.options if idle_options({**values, "criterion": criterion}).get(_field(name))}

    def cells(self) -> dict[str, Settings]:
        """Return the settings of every run by its folder's name; the seed changes fastest."""
        return dict(
            self.cell(criterion, sparsity, seed)
            for sparsity in self.sparsities
            for criterion in self.criteria
            for seed in range(self.seeds)
        )

    def cell(self, criterion: str, sparsity: float, seed: int) -> tuple[str, Settings]:
        """Return the name of one run's folder, and its settings."""
        idle = self._idle(criterion)
        common = {name: value for name, value in self._common().items() if name not in idle}
        name = f"{criterion.replace(':', '-')}-{sparsity:.12g}-seed{seed}"
        own = {"criterion": criterion, "sparsity": sparsity, "seed": seed, "out": f"{self.out}/{name}"}
        return name, Settings.from_options({**common, **own})

    def earlier(self) -> dict[str, Settings]:
        """Return the cells that lie in the folder already and were not asked for this time, by name.

        Raises:
            RunFolderError: one was written with other options.
        """
        asked, found = self.cells(), {}
        for folder in sorted(Path(self.out).glob("*-seed*")):
            if folder.name in asked or not is_run_folder(folder):
                continue
            ran = resumed({"out": str(folder)})
            if ran.sparsity is None:
                continue
            name, settings = self.cell(ran.criterion, ran.sparsity, ran.seed)
            if name == folder.name:
                _require_same(name, settings)
                found[name] = settings
        return found

    def command(self) -> str:
        """Return what to type for this grid."""
        words = ["compress", "compare"]
        for name, value in self.options.items():
            words += as_words(name, value)
        words += [
            "--criteria",
            ",".join(self.criteria),
            "--sparsity",
            ",".join(f"{each:.12g}" for each in self.sparsities),
        ]
        return shlex.join([*words, "--seeds", str(self.seeds), "--out", self.out])


def _field(name: str) -> str:
    return name.replace("-", "_")


@dataclass(frozen=True)
class GridResult:
    """What came of one call.

    Attributes:
        comparison: of all cells in the folder that are finished, whoever ran them and when.
        timed_out: whether the time limit ended it.
    """

    comparison: report.comparison.Comparison
    timed_out: bool


def run_grid(
    grid: Grid,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    time_limit_s: float | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> GridResult:
    """Run what is not finished of a grid; writes run folders, and the comparison whenever one of them ends.

    Args:
        grid: what is compared.
        jobs: runs side by side, each with its share of the processor's cores.
        shard: `(i, n)`: only every n-th cell, from the i-th on.
        time_limit_s: seconds after which runs are stopped between two steps; the next call goes on.
        on_progress: called with what is done, how many cells are finished, and how many there are.

    Raises:
        RangeError: a number out of range.
        RunFolderError, InputError: a cell's folder holds a run with other options.
        KeyboardInterrupt: stopped from outside; runs have written their checkpoints.
    """
    number, count = shard
    if jobs < 1:
        raise RangeError("jobs", jobs, "1, 2, 3, ...")
    if not 1 <= number <= count:
        raise RangeError("shard", f"{number}/{count}", "1/N to N/N")
    if time_limit_s is not None and not time_limit_s >= 0:
        raise RangeError("time-limit", time_limit_s / 60, "0 or more minutes")
    cells = grid.cells()
    for name, settings in cells.items():
        _require_same(name, settings)
    earlier = grid.earlier()
    Path(grid.out).mkdir(parents=True, exist_ok=True)
    queue = [name for index, name in enumerate(cells) if index % count == number - 1 and not _is_finished(cells[name])]
    pool = _Pool(cells, max(1, _threads() // jobs))
    until = None if time_limit_s is None else time.monotonic() + time_limit_s
    timed_out = False
    try:
        while queue or pool.running:
            on_progress("runs", sum(map(_is_finished, cells.values())), len(cells))
            timed_out = until is not None and time.monotonic() >= until
            if timed_out:
                break
            while queue and len(pool.running) < jobs:
                pool.start(queue.pop(0))
            if pool.ended(0.5 if until is None else min(0.5, max(0.0, until - time.monotonic()))):
                _write(grid, cells, earlier)
    finally:
        pool.stop()
    return GridResult(_write(grid, cells, earlier), timed_out)


def _threads() -> int:
    """Return how many threads the cells may have together: as many as cores, or as OMP_NUM_THREADS says."""
    cores = int(describe_machine()["cores"])
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) > 0 else cores


def _require_same(name: str, settings: Settings) -> None:
    """Refuse a cell that another grid wrote differently."""
    if not (Path(settings.out) / "config.toml").exists():
        return
    try:
        resumed(settings.given())
    except CompressorError as error:
        raise RunFolderError(f"cell {name} was written by another grid: {error}") from error


def _is_finished(settings: Settings) -> bool:
    return (Path(settings.out) / "report.json").exists()


def _trains_alike(one: Settings, other: Settings) -> bool:
    """Return whether two cells have the same dense model: `--ema` is for criteria without masks alone, say."""
    return one.training(one.epochs) == other.training(other.epochs)


def _failure(settings: Settings) -> Path:
    """Return the file beside a cell's folder that says why it failed."""
    return Path(f"{settings.out}.failed.txt")


class _Pool:
    """Processes that each run one cell."""

    def __init__(self, cells: Mapping[str, Settings], threads: int) -> None:
        self.running: dict[str, BaseProcess] = {}
        self._cells = cells
        self._threads = threads

    def start(self, name: str) -> None:
        """Begin or go on with a cell, in a process of its own."""
        settings = self._cells[name]
        donors = [each for each in self._cells.values() if _trains_alike(each, settings) and _is_finished(each)]
        _failure(settings).unlink(missing_ok=True)
        arguments = (settings.given(), donors[0].out if donors else "", self._threads)
        process = get_context("spawn").Process(target=_run_cell, args=arguments, name=name)
        # Before the spawn: a thread pool has its size from its first use on.
        with _environment(OMP_NUM_THREADS=str(self._threads)):
            process.start()
        self.running[name] = process
        logger.info("cell %s begins, process %s", name, process.pid)

    def ended(self, timeout_s: float) -> list[str]:
        """Wait until a cell ends, or so long; return the names of those that did."""
        wait([each.sentinel for each in self.running.values()], timeout_s)
        over = [name for name, process in self.running.items() if not process.is_alive()]
        for name in over:
            process = self.running.pop(name)
            process.join()
            self._look_at(name, process.exitcode)
        return over

    def _look_at(self, name: str, code: int | None) -> None:
        failure = _failure(self._cells[name])
        if code == _BUSY:
            logger.warning("cell %s is run by another process: it is passed over", name)
        elif code not in (_DONE, _FAILED, _STOPPED):
            failure.write_text(f"its process ended with exit code {code}\n", encoding="utf-8")
        if failure.exists():
            logger.warning("cell %s failed: %s", name, failure.read_text(encoding="utf-8").strip())

    def stop(self) -> None:
        """Ask all to stop between two steps, and wait until they have."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.join()
        self.running.clear()


class _environment:
    """Sets environment variables inside a `with`, for processes that are started there."""

    def __init__(self, **values: str) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._values}
        os.environ.update(self._values)

    def __exit__(self, *error: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run_cell(options: dict[str, Any], dense_from: str, threads: int) -> None:
    """Run one cell to its end in this process, and say by the exit code how it ended."""
    with suppress(AttributeError, OSError):
        os.setsid()  # Ctrl-C in the terminal is for the grid, which then asks its cells to stop
    Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    has_begun = (Path(options["out"]) / "config.toml").exists()
    settings = resumed(options) if has_begun else Settings.from_options(options)
    stop = StopRequest()
    try:
        with stop.listening():
            run(
                settings,
                resume=has_begun,
                stop=stop,
                dense_from=Path(dense_from) if dense_from else None,
                timings=False,
            )
    except KeyboardInterrupt:
        raise SystemExit(_STOPPED) from None
    except RunFolderError as error:
        if "in use by" in str(error):
            raise SystemExit(_BUSY) from None
        _say(settings, error)
    except Exception as error:
        _say(settings, error)


def _stop_with_parent() -> None:
    """Ask this process to stop when that of the grid is gone, whatever ended it."""
    parent = parent_process()
    if parent:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _say(settings: Settings, error: Exception) -> None:
    reason = str(error) if isinstance(error, CompressorError) else f"{type(error).__name__}: {error}"
    _failure(settings).write_text(reason + "\n", encoding="utf-8")
    raise SystemExit(_FAILED) from error


def _write(grid: Grid, cells: Mapping[str, Settings], earlier: Mapping[str, Settings]) -> report.comparison.Comparison:
    """Write what is known by now of a grid, and of the cells that earlier ones left in its folder."""
    every = {**cells, **earlier}
    finished = {name for name, settings in every.items() if _is_finished(settings)}
    failed = {
        name: _failure(settings).read_text(encoding="utf-8").strip()
        for name, settings in cells.items()
        if name not in finished and _failure(settings).exists()
    }
    found = report.comparison.Comparison(
        name=Path(grid.out).resolve().name,
        command=grid.command(),
        cells=tuple(
            report.comparison.Cell.from_report(report.read(Path(settings.out)))
            for name, settings in every.items()
            if name in finished
        ),
        failed=failed,
        missing=tuple(name for name in cells if name not in finished and name not in failed),
        machine=describe_machine(),
    )
    report.comparison.write(found, Path(grid.out))
    return found
