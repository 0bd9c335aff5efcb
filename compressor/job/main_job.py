"""The main job: from settings to a run folder with a smaller network, proven, measured and reported.

    report = run(Settings(model="resnet18", data="digits", sparsity=0.6, out="runs/demo"))

Pruning during training runs two stages from the same initial weights, "dense" and "pruned", equally long. Pruning after
training runs a common stage "train" first; then the pruned copy is fine-tuned, and the dense model is trained on for
just as long. Whatever can be refused is refused before anything slow begins and before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from compressor import report
from compressor._utils import Ranks, StopRequest, launched
from compressor.deploy import describe
from compressor.errors import InputError
from compressor.graph import copied, trace
from compressor.job import saved
from compressor.job.folder import clear_unfinished, copy_checkpoints, locked, require_usable, resumed, start
from compressor.job.option_table import PUBLISHED
from compressor.job.results import finish
from compressor.job.settings import Settings
from compressor.job.stages import DENSE_STAGES, Progress, Stages
from compressor.training import (
    Data,
    Metric,
    find_learning_rate,
    fit_weights,
    load_data,
    load_weights,
    models,
    published_weights,
    require_scores,
    require_synchronizable,
)


@dataclass(frozen=True)
class _Call:
    """How `run` was called."""

    resume: bool
    on_progress: Progress
    on_record: Callable[[Mapping[str, Any]], None]
    stop: StopRequest | None
    dense_from: Path | None
    timings: bool


def run(
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress = lambda what, done, total: None,
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    stop: StopRequest | None = None,
    dense_from: Path | None = None,
    timings: bool = True,
) -> report.Report:
    """Train, prune, prove, measure and report; writes the run folder `settings.out`.

    Started by `torchrun`, the processes train together; the first one alone writes, proves and measures.

    Args:
        settings: what to do.
        resume: go on with the run in that folder; stages that are over are not repeated.
        overwrite: replace the run in that folder.
        on_progress: called with a piece of long work, how much of it is done, and its size.
        on_record: called with every record of `metrics.jsonl` when it arises.
        stop: asks to stop; a training comes to the end of a step and writes a checkpoint first.
        dense_from: the folder of a finished run that trained the same dense model, which is taken from there.
        timings: whether latency is measured; beside other runs it would say nothing.

    Returns:
        What `report.json` holds; every process of `torchrun` gets it.

    Raises:
        RunFolderError: the folder cannot be used so.
        UnknownNameError, InputError, DataError, ArtifactError, TraceError: the data, the model, its weights or the
            criterion cannot be used.
        BudgetError: the sparsity cannot be reached, whatever is cut.
        ExportError: the model cannot be exported to ONNX. (Where only the finished one cannot, a note says so.)
    """
    folder = Path(settings.out)
    call = _Call(resume, on_progress, on_record, stop, dense_from, timings)
    with launched(settings.device) as ranks:
        if settings.sync_batchnorm:
            require_synchronizable(ranks, settings.device)
        if ranks.size > 1:
            _require_shared(settings)
        if not ranks.is_first:
            silent = replace(call, on_progress=lambda what, done, total: None, on_record=lambda record: None)
            return _run_in(folder, settings, silent, ranks)
        require_usable(folder, resume=resume, overwrite=overwrite)
        if resume:
            resumed(settings.given())
        with locked(folder):
            # Once more: what was free a moment ago may be another run's by now.
            require_usable(folder, resume=resume, overwrite=overwrite)
            clear_unfinished(folder)
            return _run_in(folder, settings, call, ranks)


def _require_shared(settings: Settings) -> None:
    """Refuse what several processes on one machine would spoil."""
    if settings.measure == "latency":
        raise InputError(
            "--measure latency times layers, and the processes of torchrun would disturb each other: train in one, or "
            "measure macs"
        )


def _run_in(folder: Path, settings: Settings, call: _Call, ranks: Ranks) -> report.Report:
    """Run in a folder that nobody else works in but the ranks."""
    is_finished = ranks.is_first and call.resume and (folder / "report.json").exists()
    finished = ranks.object_of_the_first(report.read(folder) if is_finished else None)
    if finished:
        return finished
    with ranks.first_alone():  # it may download
        data = load_data(
            settings.data,
            seed=settings.seed,
            download=settings.download,
            cache=Path(settings.cache) if settings.cache else None,
            on_progress=partial(call.on_progress, "reading data"),
        )
    model, data = _initial(settings, data)
    teacher = _teacher(settings, data)
    if settings.lr == "auto":
        found = find_learning_rate(model, data, settings.training()) if ranks.is_first else 0.0
        settings = replace(settings, lr=ranks.object_of_the_first(found))
    metric = Metric.from_path(settings.metric) if settings.metric else None
    graph = trace(model, torch.zeros(1, *data.image_shape))
    stages = Stages(
        settings,
        data,
        folder,
        resume=call.resume or call.dense_from is not None,
        on_progress=call.on_progress,
        on_record=call.on_record,
        stop=call.stop,
        network=graph.recording.fingerprint(),
        teacher=teacher,
        ranks=ranks,
    )
    if not call.resume and ranks.is_first:
        stages.preflight(model)
        if metric:
            metric.of(copied(model).to(settings.device))  # fails now rather than after the training
        start(folder, settings)
        if call.dense_from:
            copy_checkpoints(call.dense_from, folder, DENSE_STAGES)
    trained = stages.during(model) if settings.when == "during" else stages.after(model)
    made: report.Report | None = None
    if ranks.is_first:
        made = finish(settings, data, trained, graph, stages, call.on_progress, call.timings, metric)
    return cast(report.Report, ranks.object_of_the_first(made))


def _initial(settings: Settings, data: Data) -> tuple[nn.Module, Data]:
    """Return the dense model as both ways begin with it, and the data, normalised as published weights expect it."""
    model = models.build(settings.model, classes=len(data.classes), stem=settings.stem, seed=settings.seed)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise InputError(
                f"{name!r} of {settings.model} is {parameter.dtype}, and images come as torch.float32: let its "
                "factory return model.float(); for other precisions use compressor.prune in a loop of your own"
            )
    if settings.weights == PUBLISHED:
        published = published_weights(settings.model)
        fit_weights(model, published.tensors, f"the published weights of {settings.model}")
        return model, data.normalised(published.mean, published.std)
    if settings.weights:
        load_weights(model, Path(settings.weights))
    return model, data


def _teacher(settings: Settings, data: Data) -> nn.Module | None:
    """Return the teacher in a file, if one was named, on the device of the run."""
    if not settings.teacher:
        return None
    path = Path(settings.teacher)
    built_by = (describe(path).spec or {}).get("factory", "")
    if models.names_code(built_by) and built_by != settings.model:
        raise InputError(
            f"the teacher {path} was built by {built_by}, and no code is imported but that of --model "
            f"{settings.model}: give a teacher of the same factory, or of torchvision"
        )
    # A file that names a model of torchvision or timm needs no factory, whatever --model is.
    needs_factory = not built_by or models.names_code(built_by)
    teacher, _ = saved.loaded(path, settings.model if needs_factory else "")
    teacher.requires_grad_(False).to(settings.device)
    require_scores(teacher, data, settings.device)
    return teacher
