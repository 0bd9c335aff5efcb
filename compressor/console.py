"""What the command line shows: tables and results on stdout; progress, warnings and messages on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

# NOTE: Rooms come as modules where their names need torch: they import it when a name is looked up, not before.
from compressor import job, report

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 120  # of tables that go into a file or a pipe


def printable(text: str) -> str:
    """Return text that does nothing to a terminal: names from files may hold escape codes."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def show_warnings() -> None:
    """Let the library's warnings appear on stderr like the messages of this module."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("compress: %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("compressor").addHandler(handler)


class _Printable(logging.Formatter):
    """Formats records without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        return printable(super().format(record))


@contextmanager
def progress_bars(
    quiet: bool, batch_size: int = 0
) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[Mapping[str, Any]], None]]]:
    """Show a bar for each piece of long work, on a terminal only.

    Gives `on_progress(what, done, total)` and `on_record(record)`; what a training's last record says stands behind its
    bar, and how many images it takes in a second.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}
        known: dict[str, dict[str, Any]] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, said="")
            bars.update(tasks[what], completed=done, total=total)

        def on_record(record: Mapping[str, Any]) -> None:
            task = tasks.get(job.training_of(record["stage"]))
            if task is None:
                return
            latest = known.setdefault(record["stage"], {})
            latest.update(record)
            forms = {
                "train_loss": "loss {:.3g}",
                "validation_accuracy": "{:.1%} right",
                "params": "{:,} params",
                "macs": "{:,} MACs",  # of the last cut
            }
            said = [form.format(latest[name]) for name, form in forms.items() if name in latest]
            speed = bars.tasks[task].speed or 0.0  # in steps
            bars.update(task, said=", ".join([*said, f"{speed * batch_size:,.0f} images/s"]))

        yield on_progress, on_record


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> None:
    """Print a table; columns in `words` are left-aligned, the others right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="left" if index in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    _console().print(table)


def show_run(made: report.Report, folder: Path) -> None:
    """Print the result of a run: dense beside pruned, in one sentence, and where the files are."""
    rows = [(row.label, row.dense, row.pruned, row.change) for row in report.tables.comparison(made)]
    print_table(made.name, ("", "dense", "pruned", "change"), rows)
    typer.echo(report.tables.summary(made))
    for note in (*made.goal.blocked, *made.notes):
        typer.echo(f"note: {note}")
    typer.echo("files:")
    for name in (*made.files, "report.html", "report.md", "report.json"):
        if (folder / name).exists():  # a finished run may have been tidied up
            typer.echo(f"  {folder / name}")


def show_times(times: Mapping[str, job.timed_files.Timed], noise: float, where: str, batch_size: int) -> None:
    """Print a line for each file that was timed; `where` is the batch, device and threads in words."""
    first = next(iter(times.values())).latency.samples_ms
    rows = [
        (
            file,
            ", ".join("x".join(map(str, shape)) or "1" for shape in each.shapes),
            *map(report.milliseconds, (each.latency.p50_ms, each.latency.p90_ms, each.latency.p99_ms)),
            str(each.latency.n),
            f"{1e3 * batch_size / each.latency.p50_ms:.4g}",
            "" if each.memory_bytes is None else report.size(each.memory_bytes),
            "" if each.latency.samples_ms is first else report.verdict(first, each.latency.samples_ms, noise),
        )
        for file, each in times.items()
    ]
    head = ("file", "inputs", "p50", "p90", "p99", "calls", "images/s", "memory", "as the first")
    print_table(f"milliseconds, {where}; the first file and itself differ by {noise:.1%}", head, rows, (0, 1))


def show_inspection(found: Mapping[str, Any], model: str) -> None:
    """Print the groups of a model, and what is frozen."""
    count = report.count
    groups = [
        (
            group["name"],
            str(group["channels"]),
            "yes" if group["exact"] else "no",
            count(group["params_per_channel"]),
            count(group["macs_per_channel"]),
            _members(group, "producer"),
            _members(group, "consumer"),
        )
        for group in found["groups"]
    ]
    head = ("group", "channels", "exact", "params each", "MACs each", "written by", "read by")
    print_table(f"{model}: {count(found['params'])} parameters, {count(found['macs'])} MACs", head, groups, (0, 5, 6))
    frozen = [(each["tensor"], str(each["dim"]), str(each["count"]), each["reason"]) for each in found["frozen"]]
    print_table("frozen", ("tensor", "dim", "positions", "reason"), frozen, (0, 3))
    for note in found["notes"]:
        typer.echo(f"note: {note}")


def _members(group: Mapping[str, Any], role: str) -> str:
    return "\n".join(
        member["tensor"].rpartition(".")[0] or member["tensor"] for member in group["members"] if member["role"] == role
    )
