"""The main job: what lies in the run folder is what was trained, and a killed run goes on as if it had not been."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sample_report import sample
from torch import Tensor, nn
from torch.nn import functional as F
from user_models import plain, tiny

from compressor import job, report
from compressor._utils import StopRequest
from compressor.deploy import LatencyTable, describe, latency, load, open_session, save
from compressor.errors import BudgetError, CompressorError, ExportError, InputError, RunFolderError
from compressor.job import Settings, results, stages
from compressor.job import folder as folders
from compressor.report import Report
from compressor.report.model_card import model_card
from compressor.training import ModelSpec, evaluate, models
from compressor.training.data import sources as datasets

DURING = {"model": "user_models:tiny", "epochs": 3, "round-to": 4, "prune-every": 9}
AFTER = {"model": "user_models:tiny", "epochs": 2, "finetune-epochs": 2, "round-to": 4, "criterion": "l1"}
QUICK = {**AFTER, "reconstruct": False}  # for what has nothing to do with how well the cut network does
BY_RELEVANCE = {**AFTER, "criterion": "relevance", "when": "after", "rounds": 3}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=[DURING, AFTER, BY_RELEVANCE], ids=["during", "after", "rounds"])
def finished(request, tmp_path_factory) -> tuple[Settings, Report, list[tuple[str, int, int]]]:
    torch.set_num_threads(1)
    settings = Settings.from_options({**request.param, "out": str(tmp_path_factory.mktemp("runs") / "run")})
    progress: list[tuple[str, int, int]] = []
    return settings, job.run(settings, on_progress=lambda *step: progress.append(step)), progress


def test_the_run_folder_holds_what_it_should_and_nothing_else(finished) -> None:
    settings, made, _ = finished
    folder = Path(settings.out)
    names = {path.name for path in folder.iterdir()}
    models = {*folders.MODELS} - {*folders.LOWERED}
    assert names == {*models, *folders.RECORDS, *folders.REPORTS, "README.md", "checkpoint", ".lock"}
    assert made.files == {name: (folder / name).stat().st_size for name in made.files}
    assert report.read(folder) == made


def test_what_relevance_saw_before_the_last_cut_stands_in_the_report(finished) -> None:
    settings, made, _ = finished
    lines = map(json.loads, (Path(settings.out) / "metrics.jsonl").read_text().splitlines())
    observed = [line["observed"] for line in lines if "observed" in line]
    if settings.when == "after":
        assert (observed, made.relevance) == ([], ())
        return
    assert [each.name for each in made.relevance] == list(observed[-1])
    for each in made.relevance:
        of = observed[-1][each.name]
        assert sum(each.is_above) == sum(value > settings.confidence for value in of["confidence"])
        assert each.deviations[0] * of["dummies_spread"][0] + of["dummies_mean"][0] == pytest.approx(of["r"][0])


def test_config_toml_makes_the_same_settings(finished) -> None:
    settings, _, _ = finished
    assert Settings.from_options(tomllib.loads((Path(settings.out) / "config.toml").read_text())) == settings


def test_the_saved_models_have_the_reported_size_and_accuracy(finished) -> None:
    settings, made, _ = finished
    data = datasets.load_data("digits")
    for name, figures in (("model", made.pruned), ("dense", made.dense)):
        model = load(Path(settings.out) / f"{name}.safetensors", factory=lambda: tiny(10))
        assert sum(parameter.numel() for parameter in model.parameters()) == figures.params
        assert evaluate(model, data.test).accuracy == figures.accuracy
        assert figures.images == len(data.test)


def test_the_onnx_files_give_the_saved_models_outputs(finished) -> None:
    settings, made, _ = finished
    images, _ = next(iter(datasets.load_data("digits").test.batches(5)))
    for name in ("model", "dense"):
        session = open_session(Path(settings.out) / f"{name}.onnx")
        [given] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        model = load(Path(settings.out) / f"{name}.safetensors", factory=lambda: tiny(10))
        assert torch.allclose(torch.from_numpy(given), model(images), atol=1e-4)
    assert [check.file for check in made.parity] == ["dense.onnx", "model.onnx"]
    assert all(check.images > 100 for check in made.parity)


def test_the_target_is_reached_and_the_costs_agree(finished) -> None:
    settings, made, _ = finished
    assert made.goal.asked == settings.sparsity
    assert made.goal.reached == 1 - made.pruned.params / made.dense.params
    assert made.goal.reached >= settings.sparsity
    assert made.pruned.macs == made.pruned.fvcore_macs
    assert made.dense.macs == made.dense.fvcore_macs
    assert made.pruned.channels == sum(layer.after for layer in made.layers)
    assert all(layer.after % settings.round_to == 0 for layer in made.layers)


def test_both_models_are_trained_equally_long_on_equal_terms(finished) -> None:
    settings, made, _ = finished
    epochs = {stage: [e for e in made.epochs if e.stage == stage] for stage in ("train", "dense", "pruned")}
    assert len(epochs["train"]) == (settings.epochs if settings.when == "after" else 0)
    assert [e.lr for e in epochs["dense"]] == [e.lr for e in epochs["pruned"]]
    assert [e.step for e in epochs["dense"]] == [e.step for e in epochs["pruned"]]
    assert {e.params for e in epochs["dense"]} == {made.dense.params}
    assert epochs["pruned"][-1].params == made.pruned.params


def test_the_cuts_add_up_to_what_is_gone(finished) -> None:
    _, made, _ = finished
    assert sum(cut.channels for cut in made.cuts) == made.dense.channels - made.pruned.channels
    assert made.cuts[-1].params == made.pruned.params
    assert {cut.stage for cut in made.cuts} == {"pruned"}


def test_metrics_are_the_records_of_the_report(finished) -> None:
    settings, made, _ = finished
    lines = [json.loads(line) for line in (Path(settings.out) / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "event" not in line] == [vars(epoch) for epoch in made.epochs]
    assert sum(line.get("event") == "cut" for line in lines) == len(made.cuts)


def test_rounding_to_what_pays_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(LatencyTable, "step", 12)
    given = {**AFTER, "round-to": "auto", "target-batch": 4, "epochs": 1, "finetune-epochs": 0, "reconstruct": False}
    settings = Settings.from_options({**given, "out": str(tmp_path / "run")})
    assert settings.target_engine == "onnxruntime"
    made = job.run(settings, timings=False)
    assert {layer.after % 12 for layer in made.layers if layer.after < layer.before} == {0}
    assert folders.resumed({"out": str(tmp_path / "run")}) == settings


def test_latency_is_measured_in_every_place(finished) -> None:
    _, made, _ = finished
    places = {(t.model, t.backend, t.batch_size) for t in made.timings}
    wanted = {(m, b, n) for m in ("dense", "pruned", "control") for b in ("torch", "onnxruntime") for n in (1, 8, 32)}
    assert places == wanted
    # All models and engines took turns: as many calls of each.
    assert len({(t.batch_size, t.n) for t in made.timings}) == 3
    assert {each.name for each in made.layer_times} == {"0", "3", "6", "11", ""}
    assert all(each.dense_ms > 0 and each.pruned_ms > 0 for each in made.layer_times)


def test_progress_comes_to_its_end(finished) -> None:
    _, _, progress = finished
    last = {what: (done, total) for what, done, total in progress}
    assert {"training: dense", "training: pruned", "ONNX", "latency"} <= last.keys()
    assert all(done == total for done, total in last.values())


def test_a_saved_model_says_what_it_needs_to_be_used(finished) -> None:
    settings, _, _ = finished
    about = describe(Path(settings.out) / "model.safetensors")
    data = datasets.load_data("digits")
    assert about.extra["result"]["data"] == "digits"
    assert about.extra["classes"] == [str(n) for n in range(10)]
    assert about.extra["image_shape"] == [3, 32, 32]
    assert about.extra["mean"] == pytest.approx(data.train.mean)
    assert about.extra["std"] == pytest.approx(data.train.std)
    assert about.extra["result"]["sparsity"] > 0
    assert about.cut


def test_a_finished_run_is_not_repeated(finished, monkeypatch) -> None:
    settings, made, _ = finished
    before = files_in(Path(settings.out))
    monkeypatch.setattr(stages, "train", None)
    assert job.run(settings, resume=True) == made
    assert files_in(Path(settings.out)) == before


class Killed(BaseException):
    """As by a signal: no handler of exceptions sees it."""


def killer(stage: str, step: int) -> Callable[[str, int, int], None]:
    def on_progress(what: str, done: int, total: int) -> None:
        if (what, done) == (f"training: {stage}", step):
            raise Killed

    return on_progress


def leave_out_exports(monkeypatch) -> None:
    """Let a run end with its models, and not try at its start whether they can be exported: both take long."""
    monkeypatch.setattr("compressor.job.main_job.finish", lambda settings, data, trained, *rest: trained)
    monkeypatch.setattr("compressor.job.stages.require_exportable", lambda model, example: None)


def outcome(settings: Settings, monkeypatch, *kills: tuple[str, int]) -> tuple[list[dict], dict, dict]:
    """Run, killed and resumed once for each of `kills`; give the records without times, and both models' tensors."""
    leave_out_exports(monkeypatch)
    for number, kill in enumerate(kills):
        with pytest.raises(Killed):
            job.run(settings, resume=number > 0, on_progress=killer(*kill))
    trained = job.run(settings, resume=bool(kills))
    lines = [json.loads(line) for line in (Path(settings.out) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines, trained.dense.state_dict(), trained.pruned.state_dict()


# 18 steps an epoch, cuts every 9 steps from 10 % of the training on
@pytest.mark.parametrize(
    ("options", "kills"),
    [
        (DURING, [("dense", 20), ("pruned", 40)]),
        ({**DURING, "sparsity": 0.85}, [("pruned", 1), ("pruned", 20), ("pruned", 53)]),
        (QUICK, [("train", 20), ("dense", 20), ("pruned", 20)]),
        ({**QUICK, "distill": 0.5, "checkpoint-every": 5}, [("dense", 20), ("pruned", 7), ("pruned", 33)]),
    ],
    ids=["during", "during, thrice, once narrow", "after", "distilled"],
)
def test_a_killed_run_goes_on_bit_for_bit(options, kills, tmp_path: Path, monkeypatch) -> None:
    whole = outcome(Settings.from_options({**options, "out": str(tmp_path / "whole")}), monkeypatch)
    killed = outcome(Settings.from_options({**options, "out": str(tmp_path / "killed")}), monkeypatch, *kills)
    assert killed[0] == whole[0]
    for there, here in zip(killed[1:], whole[1:], strict=True):
        assert there.keys() == here.keys()
        assert all(torch.equal(there[name], here[name]) for name in here)


def test_a_cut_that_was_made_is_not_made_again(tmp_path: Path, monkeypatch) -> None:
    """By latency it would be another one, and what had been trained since would fit no longer."""
    settings = Settings.from_options({**QUICK, "out": str(tmp_path)})
    leave_out_exports(monkeypatch)
    with pytest.raises(Killed):
        job.run(settings, on_progress=killer("pruned", 20))
    monkeypatch.setattr(stages, "prune", None)
    trained = job.run(settings, resume=True)
    assert trained.result.reached
    assert trained.result.params[1] == sum(parameter.numel() for parameter in trained.pruned.parameters())
    assert trained.result.widths


@pytest.mark.parametrize("options", [DURING, QUICK], ids=["during", "after"])
def test_only_the_pruned_model_learns_from_the_dense_one(options, tmp_path: Path, monkeypatch) -> None:
    plain, taught = (
        outcome(Settings.from_options({**options, "out": str(tmp_path / name), "distill": share}), monkeypatch)
        for name, share in (("plain", 0.0), ("taught", 0.7))
    )
    assert all(torch.equal(plain[1][name], taught[1][name]) for name in plain[1])
    assert any(not torch.equal(a, b) for a, b in zip(plain[2].values(), taught[2].values(), strict=True))


def test_the_dense_model_in_a_file_teaches_as_itself(tmp_path: Path, monkeypatch) -> None:
    """A run's own dense model, saved, is the teacher that it would have had."""
    options = {**DURING, "distill": 0.7}
    by_itself = job.run(Settings.from_options({**options, "out": str(tmp_path / "first")}), timings=False)
    file = tmp_path / "first/dense.safetensors"
    _, _, taught = outcome(
        Settings.from_options({**options, "out": str(tmp_path / "second"), "teacher": str(file)}), monkeypatch
    )
    pruned = load(tmp_path / "first/model.safetensors", factory=lambda: tiny(10)).state_dict()
    assert by_itself.settings["distill"] == 0.7
    assert all(torch.equal(pruned[name], taught[name]) for name in taught)


def test_a_model_of_ones_own_has_a_teacher_of_torchvision(tmp_path: Path, monkeypatch) -> None:
    save(models.build("squeezenet1_1", classes=10, seed=0), tmp_path / "big.safetensors")
    settings = {**QUICK, "epochs": 1, "finetune-epochs": 1, "distill": 0.5, "out": str(tmp_path / "run")}
    leave_out_exports(monkeypatch)
    trained = job.run(Settings.from_options({**settings, "teacher": str(tmp_path / "big.safetensors")}))
    assert trained.result.reached


@pytest.mark.parametrize(
    ("file", "says"),
    [("nowhere.safetensors", "nowhere.safetensors"), ("other.safetensors", "was built by user_models:plain")],
)
def test_a_teacher_that_cannot_be_used_is_refused_before_the_training(file: str, says: str, tmp_path: Path) -> None:
    save(plain(10), tmp_path / "other.safetensors", spec=ModelSpec("user_models:plain", 10))
    settings = {**AFTER, "model": "resnet18", "out": str(tmp_path / "run"), "distill": 0.5}
    with pytest.raises(CompressorError, match=says):
        job.run(Settings.from_options({**settings, "teacher": str(tmp_path / file)}))
    assert not (tmp_path / "run/config.toml").exists()


def test_a_resumed_run_repeats_no_finished_epoch(tmp_path: Path, monkeypatch) -> None:
    leave_out_exports(monkeypatch)
    settings = Settings.from_options({**DURING, "epochs": 2, "out": str(tmp_path / "run")})
    with pytest.raises(Killed):
        job.run(settings, on_progress=killer("pruned", 20))
    steps: list[tuple[str, int]] = []
    job.run(settings, resume=True, on_progress=lambda what, done, total: steps.append((what, done)))
    assert [step for step in steps if "training" in step[0]] == [("training: pruned", n) for n in range(19, 37)]


def test_gradients_that_a_criterion_needs_are_there_and_gone_before_training(tmp_path: Path, monkeypatch) -> None:
    settings = Settings.from_options(
        {**QUICK, "criterion": "taylor", "epochs": 1, "finetune-epochs": 0, "out": str(tmp_path / "t")}
    )
    _, _, pruned = outcome(settings, monkeypatch)
    assert sum(tensor.numel() for tensor in pruned.values()) > 0
    trained = job.run(settings, resume=True)
    assert trained.result.reached
    assert all(parameter.grad is None for parameter in trained.pruned.parameters())


@pytest.mark.parametrize("criterion", ["l1", "magnitude"])
def test_cuts_begin_and_end_where_they_are_asked_to(criterion: str, tmp_path: Path, monkeypatch) -> None:
    given = {"criterion": criterion, "when": "during", "first-cut": 0.5, "last-cut": 1.0, "epochs": 2, "prune-every": 6}
    more = {"granularity": "channel"} if criterion == "magnitude" else {}
    settings = Settings.from_options({"model": "user_models:tiny", **given, **more, "out": str(tmp_path / "run")})
    lines, _, _ = outcome(settings, monkeypatch)
    steps = [line["step"] for line in lines if "event" in line]
    assert steps
    assert min(steps) > 18  # of 36
    assert max(steps) == 36


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path, monkeypatch) -> None:
    short = {**QUICK, "epochs": 1, "finetune-epochs": 1}
    first, again, other = (
        outcome(Settings.from_options({**short, "seed": seed, "out": str(tmp_path / name)}), monkeypatch)[0]
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert first != other


def test_sparsity_that_cannot_be_reached_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    settings = Settings.from_options({**DURING, "sparsity": 0.99, "out": str(tmp_path / "run")})
    with pytest.raises(BudgetError, match=r"cannot remove 99\.0% of the params: at most [\d.]+% can go"):
        job.run(settings)
    assert not (tmp_path / "run").exists()


def test_latency_goes_without_onnxruntime_where_it_cannot_use_the_device(tmp_path: Path, monkeypatch) -> None:
    def compare(models, shape, *, onnx_files=None, **how):
        if onnx_files:
            raise InputError("onnxruntime cannot run on 'cuda' here")
        return latency.LatencyReport((), 1, {})

    monkeypatch.setattr(results.latency, "compare", compare)
    settings, data = Settings.from_options(DURING), datasets.load_data("digits")
    notes = list[str]()
    files = {"dense": tmp_path / "dense.onnx"}
    timings = results._timings(settings, data, {"dense": tiny(10)}, (files, {}), lambda *step: None, notes)
    assert (timings, notes) == ((), ["onnxruntime cannot run on 'cuda' here"])


class Guessing(nn.Module):
    """Draws dropout in evaluation mode too, so that no file can give what it gives."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = tiny(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.5, training=True)


class Branching(nn.Module):
    """Goes one of two ways by its values, which torch.export does not follow."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = tiny(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Guessing, "its ONNX file would not give what it gives: 'output' differs"),
        (Branching, "torch.export does not follow it"),
        (lambda num_classes: nn.DataParallel(tiny(num_classes)), "is wrapped in DataParallel: give what is inside"),
        (lambda num_classes: tiny(num_classes).requires_grad_(False), "no parameter of .* trains"),
        (lambda num_classes: torch.jit.script(tiny(num_classes)), "gave a scripted module"),
        (lambda num_classes: nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes)), "has no shape yet: run it once"),
        (lambda num_classes: tiny(num_classes).to("meta"), "gave a model without data"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_what_would_fail_at_the_end_is_refused_before_the_training(factory, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("user_models.odd", factory, raising=False)
    settings = Settings.from_options({**AFTER, "model": "user_models:odd", "out": str(tmp_path / "run")})
    with pytest.raises(CompressorError, match=message):
        job.run(settings)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_export_fails_at_the_end_still_has_a_report(tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(model, path, *rest, **how):
        raise ExportError("Tiny", "torch says no", "try another")

    monkeypatch.setattr(stages, "require_exportable", lambda model, inputs: None)
    monkeypatch.setattr(results, "export_onnx", fail)
    monkeypatch.setattr(results, "fvcore_macs", lambda model, inputs: 1 / 0)
    settings = Settings.from_options({**AFTER, "out": str(tmp_path / "run")})
    made = job.run(settings)
    assert "model.onnx" not in made.files
    assert made.dense.onnx_size_bytes is made.pruned.fvcore_macs is None
    assert any(note.startswith("no model.onnx: Tiny cannot be exported") for note in made.notes)
    assert "fvcore cannot count the dense model: ZeroDivisionError: division by zero" in made.notes
    assert {"torch"} == {timing.backend for timing in made.timings}
    assert (tmp_path / "run" / "report.html").exists()


# -- the folder


def test_overwrite_clears_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    settings = Settings.from_options({**DURING, "out": str(tmp_path)})
    folders.start(tmp_path, settings)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "dense").mkdir()
    mine = ["my notes.txt", "checkpoint/notes.txt"]
    for name in ("report.json", "model.onnx", "checkpoint/state.pt", "checkpoint/dense/state.pt", *mine):
        (tmp_path / name).write_text("old")
    (tmp_path / "README.md").write_text(model_card(sample()))
    folders.require_usable(tmp_path, resume=False, overwrite=True)
    folders.start(tmp_path, settings)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["checkpoint/notes.txt", "config.toml", "my notes.txt"]
    (tmp_path / "README.md").write_text("my own page")
    folders.start(tmp_path, settings)
    assert (tmp_path / "README.md").read_text() == "my own page"


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ({"config.toml": Settings().toml()}, {}, "is there already: --resume goes on with it, --overwrite replaces"),
        (
            {"config.toml": 'criterion = "l1"\n'},
            {"overwrite": True},
            "is no run folder of compress: give another --out",
        ),
        ({"notes.txt": "mine"}, {}, "is no run folder of compress: give another --out"),
        ({"notes.txt": "mine"}, {"overwrite": True}, "is no run folder of compress: give another --out"),
        ({"config.toml": 'title = "a web site"\n'}, {"overwrite": True}, "is no run folder of compress"),
        ({"config.toml": "no toml"}, {"overwrite": True}, "is no run folder of compress"),
    ],
)
def test_a_folder_that_holds_something_is_refused(tmp_path: Path, content: dict, flags: dict, message: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    before = files_in(tmp_path)
    with pytest.raises(RunFolderError, match=message):
        job.run(Settings.from_options({**DURING, "out": str(tmp_path)}), **flags)
    assert files_in(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunFolderError, match="is a file: give another --out"):
        job.run(Settings.from_options({**DURING, "out": str(tmp_path / "run")}))


def test_resume_and_overwrite_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--resume and --overwrite contradict each other"):
        job.run(Settings.from_options({**DURING, "out": str(tmp_path)}), resume=True, overwrite=True)


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no run to go on with .*leave --resume out"):
        job.run(Settings.from_options({**DURING, "out": str(tmp_path)}), resume=True)


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    folders.start(tmp_path, Settings.from_options({**DURING, "out": str(tmp_path)}))
    assert job.resumed({"out": str(tmp_path)}) == Settings.from_options({**DURING, "out": str(tmp_path)})
    assert job.resumed({"out": str(tmp_path), "epochs": 3, "device": "auto"}).epochs == 3
    with pytest.raises(RunFolderError, match=r"has --epochs 3, not 4 .*: leave it out to go on, or give another --out"):
        job.resumed({"out": str(tmp_path), "epochs": 4})
    with pytest.raises(RunFolderError, match=r"has --criterion relevance, not l1"):
        job.resumed({"out": str(tmp_path), "criterion": "l1"})


def test_metrics_of_a_stage_that_is_over_take_the_place_of_what_came_while_it_ran(tmp_path: Path) -> None:
    metrics = folders.Metrics(tmp_path / "metrics.jsonl")
    metrics.replace_stage([{"epoch": 1}])
    metrics.append({"epoch": 2})
    metrics.append({"epoch": 2, "again": True})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    metrics.replace_stage([{"epoch": 2, "loss": math.pi}])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 1}, {"epoch": 2, "loss": math.pi}]


HOLDER = """
import sys, time
from pathlib import Path
from compressor.job.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_one_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = Settings.from_options({**DURING, "epochs": 1, "out": str(folder)})
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            RunFolderError, match=rf"is in use by process {other.pid} on .*: wait until it ends, or give"
        ):
            job.run(settings)
        other.kill()  # the system gives the lock back, whatever ends a process
    with folders.locked(folder):
        assert (folder / ".lock.txt").read_text().startswith(f"process {os.getpid()} on ")
    assert [each.name for each in folder.iterdir()] == [".lock"]
    with folders.locked(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()  # made for nothing


def test_nothing_cut_is_nothing_gained(tmp_path: Path) -> None:
    """Without a cut and without fine-tuning, the pruned model is the dense one: both have had the same treatment."""
    options = {
        **DURING,
        "criterion": "l1",
        "epochs": 1,
        "finetune-epochs": 0,
        "sparsity": 0.0,
        "out": str(tmp_path / "r"),
    }
    options.pop("prune-every")
    made = job.run(Settings.from_options(options))
    assert made.pruned.accuracy == made.dense.accuracy
    assert made.pruned.loss == made.dense.loss


# -- killed, stopped, and taken up by another network


def test_what_killed_writers_left_is_removed_at_the_next_start(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml.12345.part").write_text("half")  # killed before there was a config.toml
    settings = Settings.from_options({**DURING, "out": str(tmp_path / "run")})
    stop = StopRequest()

    def ask(what: str, done: int, total: int) -> None:
        stop.signal = 15 if what.startswith("training") and done == 2 else stop.signal

    with pytest.raises(KeyboardInterrupt):
        job.run(settings, on_progress=ask, stop=stop)
    for name in (".model.onnx.1.part", ".metrics.jsonl.7.part", "checkpoint/dense/.state.pt.9.part", ".mine.1.part"):
        (tmp_path / "run" / name).write_text("half")
    job.run(settings, resume=True)
    left = [path.name for path in (tmp_path / "run").rglob(".*.part")]
    assert left == [".mine.1.part"]


def test_an_overwriting_that_was_killed_can_be_tried_again(tmp_path: Path, monkeypatch) -> None:
    settings = Settings.from_options({**DURING, "out": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(settings.toml())
    (tmp_path / "run" / "metrics.jsonl").touch()

    def killed(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.Stages, "preflight", lambda self, model: None)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            job.run(settings, overwrite=True)
    folders.require_usable(tmp_path / "run", resume=False, overwrite=True)


def test_another_network_of_the_same_shapes_does_not_go_on(tmp_path: Path, monkeypatch) -> None:
    stop = StopRequest()
    settings = Settings.from_options({**DURING, "model": "user_models:odd", "out": str(tmp_path / "run")})

    def ask(what: str, done: int, total: int) -> None:
        stop.signal = 15 if what.startswith("training") and done == 2 else stop.signal

    monkeypatch.setattr("user_models.odd", tiny, raising=False)
    with pytest.raises(KeyboardInterrupt):
        job.run(settings, on_progress=ask, stop=stop)
    monkeypatch.setattr("user_models.odd", Otherwise, raising=False)
    with pytest.raises(InputError, match=r"was made with network = \w{16}, not \w{16}"):
        job.run(settings, resume=True)


class Otherwise(nn.Sequential):
    """The same tensors as the usual model, and other code."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(*tiny(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x)


def test_more_epochs_for_a_finished_run_say_why_not(tmp_path: Path) -> None:
    settings = Settings.from_options({**DURING, "out": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(settings.toml())
    with pytest.raises(RunFolderError, match="are planned from the first step to the last"):
        folders.resumed({"out": str(tmp_path / "run"), "epochs": 9})
    (tmp_path / "run" / "config.toml").write_text("epochs = [")
    with pytest.raises(InputError, match="is no TOML"):
        folders.resumed({"out": str(tmp_path / "run")})


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_gets_a_signal_ends_with_a_checkpoint_and_goes_on_as_if_it_had_not(name, code, tmp_path) -> None:
    options = [f"--{key}={value}" for key, value in {**DURING, "out": tmp_path / "run"}.items()]
    command = [sys.executable, "-m", "compressor", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate()
    assert (process.returncode, said) == (
        code,
        f"compress: stopped; go on with: compress --resume --out {tmp_path / 'run'}\n",
    )
    whole = job.run(Settings.from_options({**DURING, "out": str(tmp_path / "whole")}), timings=False)
    again = job.run(folders.resumed({"out": str(tmp_path / "run")}), resume=True, timings=False)
    assert [replace(each, seconds=0) for each in again.epochs] == [replace(each, seconds=0) for each in whole.epochs]
    assert again.pruned.accuracy == whole.pruned.accuracy


@pytest.mark.slow
@pytest.mark.parametrize("options", [DURING, BY_RELEVANCE], ids=["during", "rounds"])
def test_a_run_in_bfloat16_is_exported_and_measured_in_float32(options: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    settings = Settings.from_options(
        {**options, "amp": True, "channels-last": True, "device": "cpu", "out": str(tmp_path / "run")}
    )
    made = job.run(settings)
    assert made.pruned.params < made.dense.params
    assert made.pruned.accuracy > 0.3
    saved = load(tmp_path / "run" / "model.safetensors", factory=lambda: tiny(10))
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.float32}


def test_the_report_tells_the_accuracy_of_every_class(finished) -> None:
    _, made, _ = finished
    assert [each.name for each in made.classes] == [str(digit) for digit in range(10)]
    assert sum(each.images for each in made.classes) == made.dense.images
    right = sum(each.images * each.pruned for each in made.classes)
    assert right / made.pruned.images == pytest.approx(made.pruned.accuracy)


METRIC = """
import torch
calls = []
def size(model):
    assert not model.training and not torch.is_grad_enabled()
    calls.append(model)
    return float(sum(parameter.numel() for parameter in model.parameters()))
def missing(model):
    return model.no_such_thing
def endless(model):
    return float("inf")
def text(model):
    return "much"
"""


def test_a_metric_of_the_users_own_stands_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures.py").write_text(METRIC)
    options = {**QUICK, "epochs": 1, "finetune-epochs": 1}
    made = job.run(Settings.from_options({**options, "metric": "figures.py:size:lower", "out": "run"}))
    (metric,) = made.metrics
    assert (metric.name, metric.higher_is_better) == ("size", False)
    assert (metric.dense, metric.pruned) == (made.dense.params, made.pruned.params)
    (row,) = (row for row in report.tables.comparison(report.read(tmp_path / "run")) if row.label == "size")
    assert row.change.endswith("(better)")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("figures.py:missing", r"metric missing\(model\) failed: AttributeError: .*; let it return a number"),
        ("figures.py:endless", r"metric endless\(model\) is inf: let it return a finite number"),
        ("figures.py:text", r"metric text\(model\) failed: ValueError"),
        ("figures.py:sise", r"'sise'.*size"),
        ("figures", r"'figures' is no import path: give package.module:metric"),
        ("nowhere.py:size", r"there is no file nowhere.py"),
    ],
)
def test_a_metric_that_fails_is_refused_before_the_training(
    metric: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures.py").write_text(METRIC)
    with pytest.raises(InputError, match=message):
        job.run(Settings.from_options({**AFTER, "metric": metric, "out": "run"}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
