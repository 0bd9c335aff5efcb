"""The end of a run: save both models, prove their ONNX files, look at the test part once, measure, report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor import report, training
from compressor.deploy import (
    ExportReport,
    ImageModel,
    PrecisionReport,
    describe_machine,
    export_onnx,
    fvcore_macs,
    latency,
    layer_times,
    onnx_layers,
    peak_memory,
    save,
    versions,
)
from compressor.errors import ExportError, InputError, ParityError
from compressor.graph import ChannelGraph
from compressor.job.exporting import accuracy_of, lower_on
from compressor.job.folder import MODELS, RECORDS
from compressor.job.settings import Settings
from compressor.job.stages import Progress, Stages, Trained
from compressor.training import Data, Evaluation, Metric, Split, evaluate

BATCH_SIZES = (1, 8, 32)  # at which both models are timed
CHECK_IMAGES = 128  # test images on which onnxruntime is held against PyTorch
FILES = {"dense": "dense", "pruned": "model"}  # names of the files, without their endings


def finish(
    settings: Settings,
    data: Data,
    trained: Trained,
    graph: ChannelGraph,
    stages: Stages,
    on_progress: Progress,
    with_timings: bool,
    metric: Metric | None = None,
) -> report.Report:
    """Return the report of a run; writes both models, their ONNX files and the report into the run folder.

    What only adds to it (an ONNX file, fvcore's count) may fail: then it is left out, and a note says so. The models
    are saved before.
    """
    folder, records = Path(settings.out), stages.metrics.records
    models = {"dense": trained.dense.eval(), "pruned": trained.pruned.eval()}
    seen = {name: evaluate(model, data.test, device=settings.device) for name, model in models.items()}
    image_model = ImageModel(data.image_shape, data.classes, data.train.mean, data.train.std)
    said = {name: _said(settings, data, trained, name, each.accuracy) for name, each in seen.items()}
    for name, model in models.items():
        save(model, folder / f"{FILES[name]}.safetensors", extra=_extra(settings, image_model, data, said[name]))
    notes = list[str]()
    tried = {
        name: _export(model, name, data, folder, on_progress, notes, image_model, said[name])
        for name, model in models.items()
    }
    exports = {name: export for name, export in tried.items() if export}
    files = {name: export.path for name, export in exports.items()}
    at_lower = files if settings.precision != "fp32" else {}
    lowered = [_lowered(stages, name, models[name], files[name], data, image_model) for name in at_lower]
    small = {name: folder / each.file for name, each in zip(files, lowered, strict=False) if not each.missed}
    timings = _timings(settings, data, models, (files, small), on_progress, notes) if with_timings else ()
    figures = {name: _figures(settings, data, trained, name, folder, notes, seen[name]) for name in models}
    made = report.Report(
        name=folder.resolve().name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.command(),
        settings=settings.given(),
        machine={**describe_machine(), "threads": torch.get_num_threads()},
        goal=_goal(trained),
        layers=tuple(report.Layer(name, *widths) for name, widths in trained.result.widths.items()),
        frozen=tuple(report.FrozenLayer(each.tensor, each.dim, each.reason, each.count) for each in graph.frozen),
        epochs=tuple(report.Epoch(**record) for record in records if "event" not in record),
        cuts=tuple(_cut(record) for record in records if record.get("event") == "cut"),
        timings=timings,
        parity=tuple(_parity(export) for export in exports.values()),
        files={name: (folder / name).stat().st_size for name in (*MODELS, *RECORDS) if (folder / name).exists()},
        notes=(*graph.notes, *trained.result.notes, *notes, *(each.missed for each in lowered if each.missed)),
        lowered=tuple(lowered),
        classes=_classes(data, seen),
        metrics=_metrics(metric, models),
        relevance=_relevance(records, settings),
        layer_times=_layer_times(settings, data, files) if with_timings else (),
        memory=_memory(settings, data, files, image_model) if with_timings else (),
        **figures,
    )
    report.write(made, folder)
    return made


def _relevance(records: Sequence[Mapping[str, Any]], settings: Settings) -> tuple[report.GroupRelevance, ...]:
    """Return what relevance showed before the last cut, if it chose."""
    observed = [record["observed"] for record in records if "observed" in record]
    limit = settings.relevance().confidence
    return tuple(
        report.GroupRelevance(
            name,
            tuple(
                (own - mean) / spread if spread else math.nan
                for own, mean, spread in zip(of["r"], of["dummies_mean"], of["dummies_spread"], strict=True)
            ),
            tuple(each > limit for each in of["confidence"]),
            of["undecided"],
            math.nan if of["reliability"] is None else of["reliability"],
        )
        for name, of in (observed[-1] if observed else {}).items()
    )


def _said(settings: Settings, data: Data, trained: Trained, name: str, accuracy: float) -> dict[str, Any]:
    """Return what a model's files say of it, JSON values by name."""
    result, index = trained.result, list(FILES).index(name)
    return {
        "model": settings.model,
        "data": data.name,
        "seed": settings.seed,
        "accuracy": accuracy,
        "params": result.params[index],
        "macs": result.macs[index],
        "criterion": settings.criterion if index else "",
        "sparsity": 1 - result.params[index] / result.params[0],
        "widths": {group: widths[index] for group, widths in result.widths.items()},
    }


def _extra(settings: Settings, image_model: ImageModel, data: Data, said: dict[str, Any]) -> dict[str, Any]:
    """Return what a model file keeps beside the model: what `compress export` needs, and what is known of it."""
    kept = {name: list(getattr(image_model, name)) for name in ("classes", "image_shape", "mean", "std")}
    return {**kept, "result": said}


def _export(
    model: nn.Module,
    name: str,
    data: Data,
    folder: Path,
    on_progress: Progress,
    notes: list[str],
    image_model: ImageModel,
    said: dict[str, Any],
) -> ExportReport | None:
    """Return what was exported; where that fails, None, and the reason goes into the notes."""
    on_progress("ONNX", list(FILES).index(name), len(FILES))
    images = _images(data.test)
    device = next(model.parameters()).device
    path = folder / f"{FILES[name]}.onnx"
    made = None
    try:
        made = export_onnx(
            model,
            path,
            images[:2].to(device),
            check_inputs=images.to(device),
            input_names=image_model.input_names,
            output_names=image_model.output_names,
            metadata=image_model.props({**said, "versions": versions()}),
        )
    except (ExportError, ParityError) as failure:
        path.unlink(missing_ok=True)  # of an earlier try: it is not this model
        notes.append(f"no {path.name}: {failure}")
    on_progress("ONNX", list(FILES).index(name) + 1, len(FILES))
    return made


def _lowered(stages: Stages, name: str, model: nn.Module, whole: Path, data: Data, says: ImageModel) -> report.Lowered:
    """Bring an ONNX file to the run's precision, and measure it on the test part; a missed gate is said, not raised.

    Args:
        stages: of the run.
        name, model, whole: of the model, and its file in float32.
        data, says: images, and what the file takes.
    """
    precision = stages.settings.precision
    target = whole.with_suffix(f".{precision}.onnx")
    try:
        made, epochs = _lower(stages, name, model, whole, target, data, says)
    except ParityError as error:
        target.unlink(missing_ok=True)  # of an earlier try
        return report.Lowered(target.name, precision, math.nan, 0, math.nan, (), f"no {target.name}: {error}")
    accuracy = accuracy_of(target, data.test, says)
    return report.Lowered(
        target.name, precision, accuracy, made.size_bytes, made.top1_agreement, made.left_whole, qat_epochs=epochs
    )


def _lower(
    stages: Stages, name: str, model: nn.Module, whole: Path, target: Path, data: Data, says: ImageModel
) -> tuple[PrecisionReport, int]:
    """Return what became of a file, and for how many epochs its model was trained on for int8.

    That is done where it was asked for and the gate is missed with all layers in int8, before any is left in float32.
    """
    settings = stages.settings
    lower = partial(
        lower_on, target=target, precision=settings.precision, data=data, says=says, tolerance=settings.tolerance
    )
    if not settings.qat_epochs:
        return lower(whole), 0
    try:
        return lower(whole, leave_whole=False), 0
    except ParityError as error:
        Path(error.kept).unlink()
    example = _images(data.test)[:2].to(settings.device)
    with TemporaryDirectory() as folder:
        trained = export_onnx(
            stages.for_int8(model, name),
            Path(folder) / whole.name,
            example,
            input_names=says.input_names,
            output_names=says.output_names,
        )
        return lower(trained.path, reference=whole), settings.qat_epochs


def _images(part: Split) -> Tensor:
    """Return the first images of a part, normalised, `(B, C, H, W)`."""
    return next(iter(part.batches(CHECK_IMAGES)))[0]


def _metrics(metric: Metric | None, models: Mapping[str, nn.Module]) -> tuple[report.OwnMetric, ...]:
    """Return what the user's own metric says of both models."""
    if metric is None:
        return ()
    dense, pruned = (metric.of(models[name]) for name in ("dense", "pruned"))
    return (report.OwnMetric(metric.name, dense, pruned, metric.higher_is_better),)


def _classes(data: Data, seen: Mapping[str, Evaluation]) -> tuple[report.ClassAccuracy, ...]:
    """Return the accuracy of every class that has test images."""
    dense, pruned = seen["dense"], seen["pruned"]
    columns = zip(data.classes, dense.images_of, dense.right_of, pruned.right_of, strict=True)
    return tuple(
        report.ClassAccuracy(name, images, of_dense / images, of_pruned / images)
        for name, images, of_dense, of_pruned in columns
        if images
    )


def _figures(
    settings: Settings, data: Data, trained: Trained, name: str, folder: Path, notes: list[str], seen: Evaluation
) -> report.Figures:
    model, index = (trained.dense, 0) if name == "dense" else (trained.pruned, 1)
    result = trained.result
    onnx = folder / f"{FILES[name]}.onnx"
    example = torch.zeros(1, *data.image_shape, device=settings.device)
    return report.Figures(
        accuracy=seen.accuracy,
        loss=seen.loss,
        images=seen.n,
        params=result.params[index],
        macs=result.macs[index],
        channels=result.channels[index],
        fvcore_macs=_second_opinion(model, example, name, notes),
        size_bytes=(folder / f"{FILES[name]}.safetensors").stat().st_size,
        onnx_size_bytes=onnx.stat().st_size if onnx.exists() else None,
    )


def _second_opinion(model: nn.Module, example: Tensor, name: str, notes: list[str]) -> int | None:
    """Return the MACs as fvcore counts them; None, with a note, for a model that it cannot follow."""
    try:
        return fvcore_macs(model, example)
    except Exception as failure:  # torch's older tracer raises whatever it stumbles over
        notes.append(f"fvcore cannot count the {name} model: {training.first_line(failure)}")
        return None


def _timings(
    settings: Settings,
    data: Data,
    models: Mapping[str, nn.Module],
    files: tuple[Mapping[str, Path], Mapping[str, Path]],
    on_progress: Progress,
    notes: list[str],
) -> tuple[report.Timing, ...]:
    """Time both models in turns, in PyTorch and onnxruntime; a note says so where the latter cannot use the device."""
    compare = partial(
        latency.compare,
        models,
        data.image_shape,
        batch_sizes=BATCH_SIZES,
        device=settings.device,
        threads=torch.get_num_threads(),
    )
    on_progress("latency", 0, 1)
    try:
        kinds = {"onnxruntime": files[0], f"onnxruntime {settings.precision}": files[1]}
        measured = compare(onnx_files={kind: each for kind, each in kinds.items() if len(each) == len(models)})
    except InputError as error:
        measured = compare()
        notes.append(str(error))
    on_progress("latency", 1, 1)
    notes += measured.warnings
    return tuple(
        report.Timing(name, place.backend, place.device, place.batch_size, times.samples_ms)
        for place in measured.comparisons
        for name, times in {**place.latencies, "control": place.control}.items()
    )


def _layer_times(settings: Settings, data: Data, files: Mapping[str, Path]) -> tuple[report.LayerTime, ...]:
    """Profile both ONNX files on the CPU, one image at once; nothing where one is missing, or the run is for a GPU."""
    if len(files) < len(FILES) or settings.device != "cpu":
        return ()
    times = layer_times(files, torch.zeros(1, *data.image_shape), threads=torch.get_num_threads())
    dense, pruned = times["dense"], times["pruned"]
    shapes = {name: {each.name: each.shape for each in onnx_layers(path)} for name, path in files.items()}
    return tuple(
        report.LayerTime(name, dense[name], pruned[name], shapes["dense"].get(name, ()), shapes["pruned"].get(name, ()))
        for name in dense
        if name in pruned
    )


def _memory(
    settings: Settings, data: Data, files: Mapping[str, Path], says: ImageModel
) -> tuple[report.PeakMemory, ...]:
    """Return what both ONNX files take on the CPU; nothing where one is missing, or the run is for a GPU."""
    if len(files) < len(FILES) or settings.device != "cpu":
        return ()
    found = []
    for size in BATCH_SIZES:
        inputs = {says.input_names[0]: np.zeros((size, *data.image_shape), np.float32)}
        dense, pruned = (peak_memory(files[name], inputs, torch.get_num_threads()) for name in FILES)
        if dense and pruned:
            found.append(report.PeakMemory(size, dense, pruned))
    return tuple(found)


def _goal(trained: Trained) -> report.Goal:
    result = trained.result
    threshold = math.nan if result.threshold is None else result.threshold
    measured = result.measured
    reached, predicted = (result.removed, math.nan) if measured is None else (measured, result.removed)
    return report.Goal(result.measure, result.asked, reached, result.blocked, threshold, result.reached, predicted)


def _cut(record: Mapping[str, Any]) -> report.Cut:
    gone = sum(before - after for before, after in record["widths"].values())
    return report.Cut(record["stage"], record["step"], gone, record["params"])


def _parity(export: ExportReport) -> report.Parity:
    return report.Parity(
        export.path.name,
        export.max_abs_difference,
        export.relative,
        export.images,
        export.top1_agreement,
        export.providers,
    )
