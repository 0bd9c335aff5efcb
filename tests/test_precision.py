"""Lower precisions: what is written, the gates that hold it, and what is left in float32 where int8 costs too much."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image
from torch import nn
from typer.testing import CliRunner
from user_models import tiny

import compressor
from compressor import deploy, job, report
from compressor.cli import app
from compressor.deploy import lower_precision, open_session
from compressor.deploy.precision import _cosines
from compressor.errors import ArtifactError, InputError, ParityError, RangeError, UnknownNameError
from compressor.job import Settings, exporting
from compressor.report import tables

BLOBS = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)


def exported(model: nn.Module, path: Path, features: int = 6) -> Path:
    return compressor.export_onnx(model.eval(), path, torch.zeros(2, features), metadata={"who": "me"}).path


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def labelled(path: Path, images: np.ndarray = BLOBS) -> list:
    """Return batches with the classes that the file itself says: its own accuracy is 1."""
    session = open_session(path)
    name = session.get_inputs()[0].name
    return [(part, session.run(None, {name: part})[0].argmax(1)) for part in np.split(images, 3)]


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_file_keeps_its_names_its_free_batch_and_what_it_says(tmp_path: Path, precision: str) -> None:
    whole = exported(two_layers(), tmp_path / "whole.onnx")
    made = lower_precision(
        whole, tmp_path / "small.onnx", precision, check=labelled(whole), calibration=np.split(BLOBS, 3)
    )
    assert made.whole_accuracy == 1
    assert made.accuracy >= 0.99
    assert made.images == 300
    before, after = open_session(whole), open_session(made.path)
    for get in ("get_inputs", "get_outputs"):
        for ours, theirs in zip(getattr(before, get)(), getattr(after, get)(), strict=True):
            assert (ours.name, ours.type, ours.shape) == (theirs.name, theirs.type, theirs.shape)
    props = after.get_modelmeta().custom_metadata_map
    assert props["who"] == "me"
    assert props["precision"] == precision
    assert json.loads(props["validation_accuracy"]) == made.accuracy


def test_weights_in_int8_are_rounded_per_channel(tmp_path: Path) -> None:
    model = two_layers()
    whole = exported(model, tmp_path / "whole.onnx")
    # With any loss allowed: on a processor without VNNI sums of this target saturate, and a layer would stay whole.
    made = lower_precision(
        whole, tmp_path / "small.onnx", "int8", check=labelled(whole), calibration=[BLOBS], tolerance=0.9,
        target="x86-vnni",
    )  # fmt: skip
    stored = initializers(made.path)
    weight = model[0].weight.detach().numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    rounded = next(each for each in stored.values() if each.dtype == np.int8 and each.size == weight.size)
    rounded = rounded if rounded.shape == weight.shape else rounded.T
    assert (np.abs(rounded).max(1) == 127).all()
    assert (np.abs(rounded * scale - weight) <= scale / 2 * 1.001).all()


def test_half_precision_halves_the_weights(tmp_path: Path) -> None:
    whole = exported(two_layers(), tmp_path / "whole.onnx")
    made = lower_precision(whole, tmp_path / "half.onnx", "fp16", check=[(BLOBS, None)])
    assert {each.dtype for each in initializers(made.path).values()} == {np.dtype(np.float16)}
    assert math.isnan(made.accuracy)
    assert made.cosine > 0.9999


def test_what_is_beyond_float16_is_refused_and_kept_beside(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e6)
        model[1].weight.div_(1e6)
    whole = exported(model, tmp_path / "whole.onnx")
    target = tmp_path / "half.onnx"
    target.write_text("of before")
    with pytest.raises(ParityError, match="in float16 an image's outputs have a cosine of") as caught:
        lower_precision(whole, target, "fp16", check=[(BLOBS, None)])
    assert Path(caught.value.kept).name == "half.failed.onnx"
    assert Path(caught.value.kept).exists()
    assert target.read_text() == "of before"


class Sign(nn.Module):
    """Says the sign of the second feature; the first one is so large that 255 steps of it drown the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
            self.second.weight.copy_(torch.eye(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def signs() -> list:
    dice = np.random.default_rng(1)
    images = np.stack([dice.uniform(0, 1e4, 300), dice.choice([-1, 1], 300) * dice.uniform(0.5, 1, 300)], 1)
    images = images.astype(np.float32)
    return [(images, (images[:, 1] < 0).astype(np.int64))]


def test_the_layer_that_hurts_stays_whole_and_is_named(tmp_path: Path) -> None:
    whole = exported(Sign(), tmp_path / "whole.onnx", 2)
    made = lower_precision(whole, tmp_path / "small.onnx", "int8", check=signs(), calibration=[signs()[0][0]])
    assert made.left_whole == ("first",)
    assert made.whole_accuracy == 1
    assert made.accuracy >= 0.99
    props = open_session(made.path).get_modelmeta().custom_metadata_map
    assert json.loads(props["float32"]) == ["first"]
    assert any(each.dtype == np.int8 for each in initializers(made.path).values())


def test_int8_that_misses_its_gate_whatever_stays_whole(tmp_path: Path) -> None:
    whole = exported(nn.Sequential(Sign().first), tmp_path / "whole.onnx", 2)  # one layer: half of it is none
    with pytest.raises(ParityError, match=r"in int8 .* of 300 images are right, and 100.00% in float32: 1 points may"):
        lower_precision(whole, tmp_path / "small.onnx", "int8", check=signs(), calibration=[signs()[0][0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.failed.onnx", "whole.onnx"]
    made = lower_precision(
        whole, tmp_path / "small.onnx", "int8", check=signs(), calibration=[signs()[0][0]], tolerance=0.7
    )
    assert made.accuracy < 0.99


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0.1, 9))
def test_cosines(rows: list, factor: float) -> None:
    ours = np.array(rows)
    some = ours[np.linalg.norm(ours, axis=1) > 1e-100]  # the square of less is 0
    assert _cosines(some, some * factor) == pytest.approx(np.ones(len(some)), abs=1e-6)
    assert _cosines(some, -some) == pytest.approx(-np.ones(len(some)), abs=1e-6)
    assert _cosines(np.zeros((2, 3)), np.array([[0.0, 0, 0], [1, 0, 0]])).tolist() == [1, 0]


def test_what_cannot_be_lowered_is_said(tmp_path: Path) -> None:
    whole = exported(two_layers(), tmp_path / "whole.onnx")
    check, out = labelled(whole), tmp_path / "x.onnx"
    (tmp_path / "broken.onnx").write_bytes(b"no network")

    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    compressor.export_onnx(Two(), tmp_path / "two.onnx", (torch.zeros(2, 6), torch.zeros(2, 6)))
    for source, precision, more, error, message in (
        (whole, "fp32", {"check": check}, UnknownNameError, "fp16"),
        (whole, "int4", {"check": check}, UnknownNameError, "int8"),
        (whole, "int8", {"check": check}, InputError, "needs calibration images"),
        (whole, "int8", {"check": [(BLOBS, None)], "calibration": [BLOBS]}, InputError, "labelled images"),
        (whole, "fp16", {"check": []}, InputError, "check holds no images"),
        (whole, "int8", {"check": check, "tolerance": 1.0}, RangeError, "tolerance"),
        (whole, "int8", {"check": check, "target": "mips"}, UnknownNameError, "tensorrt"),
        (tmp_path / "none.onnx", "fp16", {"check": check}, ArtifactError, "there is no file"),
        (
            tmp_path / "broken.onnx",
            "fp16",
            {"check": check},
            ArtifactError,
            "is no ONNX file that onnxruntime can read",
        ),
        (tmp_path / "two.onnx", "fp16", {"check": check}, ArtifactError, "has 2 inputs"),
    ):
        with pytest.raises(error, match=message):
            lower_precision(source, out, precision, **more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx", "two.onnx", "whole.onnx"]


# -- the run and the command


def test_a_run_leaves_both_models_in_int8_and_says_what_that_cost(tmp_path: Path) -> None:
    given = {"model": "user_models:tiny", "epochs": 2, "criterion": "l1", "finetune-epochs": 1, "sparsity": 0.3}
    more = {"compensate": "mean", "precision": "int8", "tolerance": 0.1, "out": str(tmp_path / "run")}
    more["qat-epochs"] = 3  # of which there is no need
    made = job.run(Settings.from_options({**given, **more}))
    assert [each.file for each in made.lowered] == ["dense.int8.onnx", "model.int8.onnx"]
    for each, name in zip(made.lowered, ("dense", "pruned"), strict=True):
        assert each.size_bytes == (tmp_path / "run" / each.file).stat().st_size
        assert not each.missed
        assert each.qat_epochs == 0
        assert each.accuracy == pytest.approx(getattr(made, name).accuracy, abs=0.1)
    assert "onnxruntime int8" in {timing.backend for timing in made.timings}
    rows = {row.label: row for row in tables.comparison(made)}
    assert rows["test accuracy in int8"].pruned == f"{made.lowered[1].accuracy:.2%}"
    assert report.read(tmp_path / "run") == made


def test_a_model_that_misses_the_gate_is_trained_on_for_int8(tmp_path: Path, monkeypatch) -> None:
    tried: list[tuple[Path, dict]] = []

    def refuse_at_first(source: Path, target: Path, **how: object) -> deploy.PrecisionReport:
        tried.append((source, how))
        made = exporting.lower_on(source, target, **how)
        if how.get("leave_whole", True):
            return made
        kept = target.with_suffix(".failed.onnx")
        target.rename(kept)
        raise ParityError("it is wrong", str(kept), "Try again")

    monkeypatch.setattr("compressor.job.results.lower_on", refuse_at_first)
    out = tmp_path / "run"
    given = {"model": "user_models:tiny", "epochs": 1, "criterion": "l1", "finetune-epochs": 1, "sparsity": 0.3}
    more = {"precision": "int8", "tolerance": 0.9, "qat-epochs": 2, "out": str(out)}
    made = job.run(Settings.from_options({**given, **more}), timings=False)
    assert [each.qat_epochs for each in made.lowered] == [2, 2]
    stages = [json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (stages.count("int8-dense"), stages.count("int8-pruned")) == (2, 2)
    assert not list(out.glob("*.failed.onnx"))
    assert {row.label: row.pruned for row in tables.comparison(made)}["epochs of training for int8"] == "2"
    # The gate holds what was trained against the run's own file, which is still of the model as it was.
    assert tried[-1][1]["reference"] == out / "model.onnx" != tried[-1][0]
    trained = compressor.load(out / "model.safetensors", factory=partial(tiny, 10))
    images = torch.randn(4, 3, 32, 32)
    of_file = open_session(out / "model.onnx").run(None, {"images": images.numpy()})[0]
    assert trained.eval()(images).detach().numpy() == pytest.approx(of_file, abs=1e-4)
    props = [open_session(out / name).get_modelmeta().custom_metadata_map for name in ("model.onnx", "model.int8.onnx")]
    assert props[0].items() - {("precision", "fp32")} <= props[1].items()


def test_a_run_whose_int8_misses_the_gate_says_so(tmp_path: Path, monkeypatch) -> None:
    def refuse(source: Path, target: Path, **rest: object) -> None:
        raise ParityError("it is wrong", str(target), "Try again")

    monkeypatch.setattr("compressor.job.results.lower_on", refuse)
    words = ["--model", "user_models:tiny", "--epochs", 1, "--criterion", "l1", "--sparsity", 0.3]
    code, said = compress(*words, "--precision", "int8", "--out", tmp_path / "run")
    assert code == 1
    assert "misses the gate of int8" in said
    rows = {row.label: row for row in tables.comparison(report.read(tmp_path / "run"))}
    assert (rows["test accuracy in int8"].dense, rows["model.int8.onnx"].pruned) == ("-", "-")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    given = {"model": "user_models:tiny", "epochs": 3, "criterion": "l1", "finetune-epochs": 1, "sparsity": 0.3}
    job.run(Settings.from_options({**given, "out": str(out)}), timings=False)
    return out


def compress(*words: object) -> tuple[int, str]:
    made = CliRunner().invoke(app, [str(word) for word in words])
    return made.exit_code, made.stdout + made.stderr


@pytest.mark.parametrize("preprocess", [False, True])
def test_a_run_folder_becomes_int8(run: Path, tmp_path: Path, preprocess: bool) -> None:
    out = tmp_path / "small.onnx"
    words = ["export", run, "--precision", "int8", "--factory", "user_models:tiny", "--out", out]
    code, said = compress(*words, *["--preprocess"] * preprocess)
    assert code == 0, said
    assert "validation images right" in said
    (taken,) = open_session(out).get_inputs()
    assert (taken.name, taken.type) == ("images", "tensor(uint8)" if preprocess else "tensor(float)")
    assert any(each.dtype == np.int8 for each in initializers(out).values())
    assert open_session(out).get_modelmeta().custom_metadata_map["precision"] == "int8"


def test_images_that_are_not_square_are_lowered_as_they_were_trained_on(tmp_path: Path) -> None:
    for split, name, number in itertools.product(("train", "test"), "ab", range(20)):
        (tmp_path / "images" / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), (8 * number, 120, 200 if name == "a" else 40)).save(
            tmp_path / f"images/{split}/{name}/{number}.png"
        )
    given = {"model": "user_models:tiny", "epochs": 1, "criterion": "l1", "finetune-epochs": 0, "batch-size": 8}
    data = f"imagefolder:{tmp_path / 'images'}"
    job.run(Settings.from_options({**given, "data": data, "out": str(tmp_path / "run")}), timings=False)
    code, said = compress("export", tmp_path / "run/model.onnx", "--precision", "fp16", "--out", tmp_path / "x.onnx")
    assert code == 0, said
    assert open_session(tmp_path / "x.onnx").get_inputs()[0].shape[1:] == [3, 16, 24]


def test_the_gate_sees_no_image_that_the_model_learnt_from(tmp_path: Path, monkeypatch) -> None:
    given = {"model": "user_models:tiny", "epochs": 1, "criterion": "l1", "finetune-epochs": 0, "seed": 3}
    job.run(Settings.from_options({**given, "out": str(tmp_path / "run")}), timings=False)
    seen: list[tuple[str, int]] = []

    real = exporting.load_data

    def load(data: str, *, seed: int, **how: object):
        seen.append((data, seed))
        return real(data, seed=seed, **how)

    monkeypatch.setattr(exporting, "load_data", load)
    for name, data in (("model.onnx", []), ("model.safetensors", []), ("model.onnx", ["--data", "digits"])):
        words = ["export", tmp_path / "run" / name, "--precision", "fp16", *data, "--out", tmp_path / "x.onnx"]
        code, said = compress(*words, *(["--factory", "user_models:tiny"] if name.endswith("safetensors") else []))
        assert code == 0, said
    assert seen == [("digits", 3)] * 3


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_file_in_a_lower_precision_is_lowered_no_further(run: Path, tmp_path: Path, precision: str) -> None:
    small = tmp_path / "small.onnx"
    code, said = compress("export", run / "model.onnx", "--precision", precision, "--out", small)
    assert code == 0, said
    for other in ("fp16", "int8"):
        code, said = compress("export", small, "--precision", other, "--out", tmp_path / "smaller.onnx")
        assert code == 2
        assert f"small.onnx is in {precision} already: give the file in float32" in " ".join(said.split())
    assert not (tmp_path / "smaller.onnx").exists()


def test_an_onnx_file_becomes_fp16_beside_itself(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes((run / "model.onnx").read_bytes())
    code, said = compress("export", file, "--precision", "fp16", "--data", "digits")
    assert code == 0, said
    assert (tmp_path / "model.fp16.onnx").exists()


def test_options_that_do_nothing_or_lack_something_are_refused(run: Path, tmp_path: Path) -> None:
    file, foreign = run / "model.safetensors", tmp_path / "foreign.onnx"
    compressor.export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), foreign, torch.zeros(2, 1, 8, 8))
    for words, message in (
        ([file, "--precision", "int3"], "int8"),
        ([file, "--data", "digits"], "--data has no effect with --precision fp32"),
        ([file, "--tolerance", "0.1"], "--tolerance has no effect with --precision fp32"),
        ([file, "--precision", "fp16", "--target", "arm"], "--target has no effect with --precision fp16"),
        ([file, "--precision", "fp16", "--tolerance", "0.1"], "--tolerance has no effect with --precision fp16"),
        ([run / "model.onnx"], "is an ONNX file already"),
        ([foreign, "--precision", "int8"], "give --data NAME"),
        ([run / "model.onnx", "--precision", "int8", "--preprocess"], "are for .safetensors files"),
        ([file, "--out", tmp_path / "x.bin"], "give one that ends in .onnx"),
    ):
        code, said = compress("export", *words)
        assert code == 2
        assert message in " ".join(said.split())
    assert list(tmp_path.iterdir()) == [foreign]
