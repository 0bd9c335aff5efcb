"""The command line: parse, call, print. This and `console` are the only modules that print.

`compress` with options runs the main job, `compress compare` many of them; `compress inspect`, `export`, `predict`,
`benchmark` and `report` are its parts. Every error that compressor raises on purpose becomes one message on stderr and
exit code 2. Nothing heavy is imported before it is known what to do, so that `compress --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

# NOTE: Rooms come as modules where their names need torch: they import it when a name is looked up, not before.
from compressor import deploy, graph, job, report, training
from compressor._utils import StopRequest, atomic_write
from compressor.console import (
    print_table,
    printable,
    progress_bars,
    show_inspection,
    show_run,
    show_times,
    show_warnings,
)
from compressor.errors import CompressorError, InputError, UnknownNameError
from compressor.job import (
    NumberOrAuto,
    Settings,
    WholeOrAuto,
    as_written,
    numbers_or_auto,
    option_kinds,
    read_toml,
)

_INTERRUPTED = 128 + signal.SIGINT  # what shells expect of a command that a signal ended
_TIMED_OUT = 124  # as of the command `timeout`


class _Commands(TyperGroup):
    """Turns the errors that compressor raises on purpose into a message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except CompressorError as error:
            _complain(error)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            _complain("stopped")
            raise typer.Exit(_INTERRUPTED) from None
        except OSError as error:  # of a result that could not be printed, say: everything else says where it failed
            _complain(f"cannot write: {error.strerror or error}")
            raise typer.Exit(1) from error


def _complain(message: object) -> None:
    who = f"compress, rank {_rank()}" if _ranks() > 1 else "compress"
    typer.echo(f"{who}: {printable(str(message))}", err=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    show_warnings()
    try:
        app(prog_name="compress")
    except OSError as error:  # of a help page that could not be printed, say
        _complain(f"cannot write the output: {error.strerror or error}")
        sys.exit(1)
    finally:
        _flush()


def _flush() -> None:
    """Write what is still waiting; where that fails, Python would complain once more in its own words."""
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
        _complain(f"cannot write the output: {error.strerror}")
        sys.exit(1)


def _takes_every_option(command: Callable[..., None], without: frozenset[str] = frozenset()) -> Callable[..., None]:
    """Return a command one parameter for every field of `Settings`; None where it was not typed."""
    kinds = {name: kind for name, kind in option_kinds().items() if name not in without}
    own = inspect.signature(command, eval_str=True).parameters.values()
    fields = {item.name.replace("_", "-"): item for item in dataclasses.fields(Settings)}
    added = [_parameter(fields[name], kind) for name, kind in kinds.items()]
    parameters = [*added, *(each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD)]
    in_order = sorted(parameters, key=lambda parameter: parameter.kind)
    command.__signature__ = inspect.Signature(in_order)  # type: ignore[attr-defined]
    return command


def _parameter(item: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    name = "--" + item.name.replace("_", "-")
    help_ = item.metadata
    shown = help_["shown"] or ("" if kind is bool else item.default)
    usual = "" if shown == "" else f" Default: {shown}."
    name += f"/--no-{name[2:]}" if kind is bool and item.default is not False else ""
    kind = list[str] if item.name == "sparsity" else kind  # one number, and PATTERN=NUMBER as often as one likes
    kind = str if kind in (NumberOrAuto, WholeOrAuto) else kind
    typed = typer.Option(name, help=help_["help"] + usual, rich_help_panel=help_["panel"])
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, typed]
    )


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"compressor {importlib.metadata.version('compressor')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
@_takes_every_option
def compress(
    ctx: typer.Context,
    *,
    config: Annotated[Path | None, typer.Option(help="Options from a TOML file.", rich_help_panel="Run")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run.", rich_help_panel="Run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run.", rich_help_panel="Run")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print errors and warnings only.", rich_help_panel="Run")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    **typed: Any,
) -> None:
    """Make a network smaller: train, prune, export, measure, report. The result is a run folder."""
    given = {name.replace("_", "-"): value for name, value in typed.items() if value not in (None, [])}
    given |= {"sparsity": as_written(given["sparsity"])} if "sparsity" in given else {}
    given = numbers_or_auto(given, option_kinds())
    if ctx.invoked_subcommand:
        if _ranks() > 1:
            raise InputError(f"torchrun is for the main job: start compress {ctx.invoked_subcommand} without it")
        flags = _flags(config=config, resume=resume, overwrite=overwrite, quiet=quiet)
        _refuse_idle(ctx.invoked_subcommand, [*given, *flags])
        return
    asked = {**(read_toml(config) if config else {}), **given}
    source = str(config) if config else ""
    if _is_restarted() and job.is_run_folder(Path(asked.get("out") or Settings.from_options(asked, source).out)):
        resume, overwrite = True, False
    settings = job.resumed(asked, source) if resume else Settings.from_options(asked, source)
    stop = StopRequest()
    try:
        with stop.listening(), progress_bars(quiet or _rank() > 0, settings.batch_size) as (on_progress, on_record):
            made = job.run(
                settings,
                resume=resume,
                overwrite=overwrite,
                on_progress=on_progress,
                on_record=on_record,
                stop=stop,
            )
    except KeyboardInterrupt:
        begun = (Path(settings.out) / "config.toml").exists()
        how = f"go on with: compress --resume --out {shlex.quote(settings.out)}" if begun else "nothing was written"
        _complain(f"stopped; {how}")
        raise typer.Exit(128 + (stop.signal or signal.SIGINT)) from None
    if _rank():
        return  # rank 0 prints, and its exit code counts
    if not quiet:
        show_run(made, Path(settings.out))
    if not made.goal.met:
        typer.echo("compress: the asked sparsity was not reached, see the notes above", err=True)
        raise typer.Exit(1)
    if made.dense.onnx_size_bytes is None or made.pruned.onnx_size_bytes is None:
        typer.echo("compress: a model could not be exported to ONNX, see the notes above", err=True)
        raise typer.Exit(1)
    if any(each.missed for each in made.lowered):
        typer.echo(f"compress: a model misses the gate of {settings.precision}, see the notes above", err=True)
        raise typer.Exit(1)


def _ranks() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    """Return which of them this is."""
    return int(os.environ.get("RANK", "0")) if _ranks() > 1 else 0


def _is_restarted() -> bool:
    """Return whether torchrun started this process again because another had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _flags(**values: object) -> list[str]:
    return [name for name, value in values.items() if value]


def _refuse_idle(command: str, names: Sequence[str]) -> None:
    """Refuse options of the main job that stand before another command."""
    if names:
        listed = ", ".join(f"--{name}" for name in names)
        raise InputError(f"{listed} before {command!r} has no effect: leave it out, or see compress {command} --help")


ModelFile = Annotated[Path, typer.Argument(help="A .safetensors file that compress saved.", metavar="FILE")]
Factory = Annotated[
    str, typer.Option(help="package.module:factory that the file's model came from. A file alone never runs your code.")
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Height and width of the images. Default: what the file says, else 224.")
]


_BY_THE_GRID = frozenset(("criterion", "sparsity", "threshold", "seed", "out"))


@app.command()
@partial(_takes_every_option, without=_BY_THE_GRID)
def compare(
    *,
    criteria: Annotated[str, typer.Option(help="Names, separated by commas.", rich_help_panel="Grid")],
    sparsity: Annotated[str, typer.Option(help="Numbers, separated by commas.", rich_help_panel="Grid")] = "0.5",
    seeds: Annotated[int, typer.Option(help="How many, from 0 on.", rich_help_panel="Grid")] = 4,
    out: Annotated[str, typer.Option(help="The folder of the grid.", rich_help_panel="Grid")] = "runs/compare",
    jobs: Annotated[
        int, typer.Option(help="Runs side by side, each with its share of the cores.", rich_help_panel="Grid")
    ] = 1,
    shard: Annotated[str, typer.Option(help="I/N: every N-th run, from the I-th on.", rich_help_panel="Grid")] = "1/1",
    time_limit: Annotated[
        float | None,
        typer.Option(help="Minutes, after which runs stop; the same line goes on with them.", rich_help_panel="Grid"),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print errors and warnings only.", rich_help_panel="Grid")
    ] = False,
    **typed: Any,
) -> None:
    """Compare criteria: a grid of runs, each in a folder of its own, ended by a figure and a table."""
    options = {name.replace("_", "-"): value for name, value in typed.items() if value not in (None, [])}
    options = numbers_or_auto(options, option_kinds())
    numbers = _numbers("sparsity", sparsity)
    first, _, last = shard.partition("/")
    if not (first.isdigit() and last.isdigit()):
        raise InputError(f"--shard {shard}: give I/N, 1/3 say")
    names = tuple(name.strip() for name in criteria.split(",") if name.strip())
    grid = job.Grid(options, names, numbers, seeds, out)
    how = {"jobs": (jobs, 1), "shard": (shard, "1/1"), "time-limit": (time_limit, None)}
    again = " ".join([grid.command(), *(f"--{name}={value}" for name, (value, usual) in how.items() if value != usual)])
    stop = StopRequest()
    try:
        with stop.listening(), progress_bars(quiet) as (on_progress, _):
            result = job.run_grid(
                grid,
                jobs=jobs,
                shard=(int(first), int(last)),
                time_limit_s=None if time_limit is None else 60 * time_limit,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        _complain(f"stopped; go on with: {again}")
        raise typer.Exit(128 + (stop.signal or signal.SIGINT)) from None
    found = result.comparison
    if not quiet:
        print_table(found.name, report.comparison.HEAD, report.comparison.rows(found))
        typer.echo(f"{report.comparison.progress(found)}: {Path(out) / 'compare.html'}")
    for name, reason in found.failed.items():
        _complain(f"{name} failed: {reason}")
    if result.timed_out:
        _complain(f"the time is over; go on with: {again}")
        raise typer.Exit(_TIMED_OUT)
    if found.failed:
        raise typer.Exit(1)


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise InputError(f"--{name} {text}: give numbers, separated by commas: 0.4,0.6") from None


@app.command("inspect")
def inspect_(
    model: Annotated[
        str, typer.Argument(help="A torchvision classifier, package.module:factory, or a .safetensors file.")
    ],
    classes: Annotated[int, typer.Option(min=1, help="Number of outputs of a model by name.")] = 10,
    stem: Annotated[str, typer.Option(help="Of a model by name: imagenet, or cifar for small images.")] = "imagenet",
    factory: Factory = "",
    image_size: ImageSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Also draw the channel graph into this file, for a browser.")] = None,
) -> None:
    """Show which channels of a model can be cut together, what each costs, and what is frozen and why."""
    if svg and svg.suffix != ".svg":
        raise InputError(f"--svg {svg} is not the name of a picture: give one that ends in .svg, as in --svg graph.svg")

    if model.endswith(".safetensors"):
        network, shape = job.saved.loaded(Path(model), factory, image_size)
    else:
        side = image_size or 224
        network = training.models.build(model, classes=classes, stem=stem, seed=0)
        shape = (3, side, side)
    job.require_memory((1, *shape))
    channels = graph.trace(network, job.saved.example(network, shape))
    if svg:
        with atomic_write(svg) as part:
            part.write_text(report.draw_graph(channels), encoding="utf-8")
    found = report.inspect_graph(channels)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show_inspection(found, model)


@app.command()
def export(
    file: Annotated[
        Path, typer.Argument(help="A run folder, a .safetensors file of compress, or an .onnx file.", metavar="FILE")
    ],
    out: Annotated[Path | None, typer.Option(help="The ONNX file. Default: beside FILE, ending in .onnx.")] = None,
    factory: Factory = "",
    image_size: ImageSize = None,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Let the file take uint8 images (B, H, W, C) and give probabilities.")
    ] = False,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    data: Annotated[
        str, typer.Option(help="Images for fp16 and int8. Default: what the model was trained on.", metavar="NAME")
    ] = "",
    tolerance: Annotated[float | None, typer.Option(help="Accuracy that int8 may lose. Default: 0.01.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What int8 runs on: x86-vnni, x86, arm or tensorrt. Default: as this machine.")
    ] = None,
) -> None:
    """Write a model as ONNX, and prove that it gives the same outputs, or nearly in a lower precision."""
    if precision not in deploy.PRECISIONS:
        raise UnknownNameError("precision", precision, deploy.PRECISIONS)
    options = job.ExportOptions(
        factory, image_size, preprocess, cast(Any, precision), data, tolerance, cast(Any, target)
    )
    made = job.export(file, out, options)
    if isinstance(made, deploy.PrecisionReport):
        whole = f"; in float32: {', '.join(made.left_whole)}" if made.left_whole else ""
        said = (
            f"{made.precision}, {made.accuracy:.2%} of {made.images:,} validation images right, "
            f"{made.whole_accuracy:.2%} in float32; {made.top1_agreement:.2%} have the same class{whole}"
        )
    else:
        said = (
            f"opset {made.opset}; largest difference from PyTorch {made.relative:.1e} of the outputs' scale, "
            f"{made.images} inputs, {', '.join(made.providers)}"
        )
    typer.echo(f"{made.path}: {report.size(made.size_bytes)}, {said}")


@app.command()
def predict(
    file: Annotated[Path, typer.Argument(help="An ONNX file that compress exported, or a run folder.", metavar="FILE")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.", metavar="IMAGE")],
    top: Annotated[int, typer.Option(min=1, help="Classes of each image.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each image.")] = False,
) -> None:
    """Say what a file sees in images, by nothing but what it says about itself."""
    unreadable: list[CompressorError] = []
    file = file / "model.onnx" if job.is_run_folder(file) else file
    files = deploy.image_files(images)
    for found in deploy.predict(file, files, top=top, device=device, on_unreadable=unreadable.append):
        if as_json:
            typer.echo(json.dumps({"image": found.image, "classes": dict(found.classes)}))
        else:
            seen = ", ".join(f"{name} {share:.1%}" for name, share in found.classes)
            typer.echo(printable(f"{found.image}: {seen}"))
    for error in unreadable:
        _complain(error)
    if unreadable:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say which engines really work on this machine, and what to install for the others."""
    rows = [(each.engine, "works" if each.works else "no", each.says) for each in job.doctor.examine()]
    print_table("engines", ("engine", "", "version, or what is missing"), rows, (0, 1, 2))


@app.command()
def benchmark(
    files: Annotated[
        list[Path],
        typer.Argument(help="Run folders, .safetensors or .onnx files to time side by side.", metavar="FILE"),
    ],
    batch_size: Annotated[list[int], typer.Option(min=1, help="Images at once; may be given several times.")] = (1, 32),  # type: ignore[assignment]
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    engine: Annotated[
        list[str],
        typer.Option(
            help="For .onnx files onnxruntime, openvino or tensorrt; for .safetensors files torch or torch.compile. "
            "May be given several times. Default: onnxruntime, torch."
        ),
    ] = (),  # type: ignore[assignment]
    factory: Factory = "",
    image_size: ImageSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every sample, instead of tables.")] = False,
) -> None:
    """Time models in turns, in one run, in each engine that was asked for; of a run folder, dense and pruned."""
    batches = []
    for size in batch_size:
        times, noise = job.timed_files.timed(files, size, device, threads, factory, image_size, engine)
        if as_json:
            batches.append((size, times, noise))
            continue
        show_times(times, noise, f"batch {size}, {device}, {threads} thread{'s' * (threads > 1)}", size)
    if as_json:
        typer.echo(json.dumps(job.timed_files.as_content(batches, device, threads), indent=1))


@app.command("report")
def report_(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs.html, .md and .json of several runs. Default: where you are.")
    ] = None,
) -> None:
    """Render the report of a run again; of several runs, show them side by side with the best of them."""
    found = [report.read(run) for run in runs]
    if len(runs) > 1:
        # By their paths: a/demo and b/demo have one name.
        named = [dataclasses.replace(each, name=str(run)) for each, run in zip(found, runs, strict=True)]
        for path in report.side_by_side.write(named, out or Path()):
            typer.echo(path)
        return
    if out:
        raise InputError("--out has no effect on the report of one run, which stands in its folder; leave it out")
    for path in report.render(found[0], runs[0]):
        typer.echo(path)
