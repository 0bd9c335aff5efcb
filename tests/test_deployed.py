"""Deployed files: what they say of themselves, and that this is enough to use them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sample_report import sample
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import compressor
from compressor import job, report
from compressor.cli import app
from compressor.deploy import ImageModel, WithPreprocessing, image_files, open_session, predict
from compressor.errors import ArtifactError, DataError, InputError
from compressor.job import Settings
from compressor.report.model_card import is_users_own, model_card
from compressor.training import load_data

positive = st.floats(0.01, 300, allow_nan=False)


@given(
    classes=st.lists(st.text(max_size=8), max_size=5),
    sides=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    mean=st.lists(positive, min_size=3, max_size=3),
    std=st.lists(positive, min_size=3, max_size=3),
    takes_pixels=st.booleans(),
)
def test_what_is_written_is_what_is_read(
    classes: list, sides: tuple, mean: list, std: list, takes_pixels: bool
) -> None:
    made = ImageModel((3, *sides), tuple(classes), tuple(mean), tuple(std), takes_pixels)
    props = made.props({"accuracy": 0.5, "model": "resnet18"})
    assert all(isinstance(value, str) for value in props.values())
    assert ImageModel.from_props(props, "x.onnx") == made
    assert (props["accuracy"], props["model"]) == ("0.5", "resnet18")


WHOLE = ImageModel((3, 8, 8), ("a", "b"), (1.0, 2.0, 3.0), (1.0, 1.0, 1.0)).props()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": None}, "x.onnx does not say 'image_shape' among its metadata: give a file that compress"),
        ({"output": None}, "x.onnx does not say 'output' among its metadata"),
        ({"image_shape": "[3, 8"}, "the metadata of x.onnx are damaged"),
        ({"image_shape": "[3, 0, 8]"}, "the metadata of x.onnx are damaged"),
        ({"image_shape": "[3, 8]"}, "the metadata of x.onnx are damaged"),
        ({"classes": '{"a": 1}'}, "the metadata of x.onnx are damaged"),
        ({"mean": None}, "x.onnx does not say by what its 3 channels are normalised: export it again"),
        ({"std": "[1.0]"}, "x.onnx does not say by what its 3 channels are normalised: export it again"),
    ],
)
def test_what_a_file_does_not_say_or_says_wrongly_is_named(changes: dict, message: str) -> None:
    props = {name: value for name, value in (WHOLE | changes).items() if value is not None}
    with pytest.raises(ArtifactError) as caught:
        ImageModel.from_props(props, "x.onnx")
    assert message in str(caught.value)


def test_pixels_in_and_probabilities_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    pixels = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8)
    mean, std = (120.0, 110.0, 100.0), (60.0, 70.0, 80.0)
    normalised = (pixels.permute(0, 3, 1, 2).float() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    with torch.no_grad():
        assert torch.allclose(WithPreprocessing(model, mean, std)(pixels), F.softmax(model(normalised), 1), atol=1e-6)
    for wrong in (((), ()), ((1.0,), (1.0, 2.0)), ((1.0,), (0.0,))):
        with pytest.raises(InputError, match="give one number for each channel"):
            WithPreprocessing(model, *wrong)


# -- a run's own files


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on 24 x 24 photographs of two classes, red and blue ones."""
    home = tmp_path_factory.mktemp("photos")
    dice = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 8)):
        for name, channel in (("red <1>", 0), ("blue", 2)):
            folder = home / "data" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = dice.integers(0, 120, (24, 24, 3)).astype(np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{index}.png")
    out = home / "run"
    settings = {
        "criterion": "l1",
        "model": "resnet18",
        "epochs": 1,
        "finetune-epochs": 1,
        "batch-size": 4,
        "compensate": "mean",
    }
    job.run(Settings.from_options({**settings, "data": f"imagefolder:{home / 'data'}", "out": str(out)}), timings=False)
    return out


def test_the_file_says_what_it_takes_and_what_it_is(run: Path) -> None:
    model = onnx.load(run / "model.onnx")
    props = {each.key: each.value for each in model.metadata_props}
    made = report.read(run)
    assert [each.name for each in model.graph.input] == ["images"]
    assert [each.name for each in model.graph.output] == ["scores"]
    assert json.loads(props["classes"]) == ["blue", "red <1>"]
    assert json.loads(props["image_shape"]) == [3, 24, 24]
    assert json.loads(props["accuracy"]) == made.pruned.accuracy
    assert json.loads(props["params"]) == made.pruned.params
    assert json.loads(props["widths"]) == {layer.name: layer.after for layer in made.layers}
    assert props["input"] == "images float32 (B, 3, 24, 24), (pixel - mean) / std"
    assert json.loads(props["versions"]).keys() == {"compressor", "torch", "torchvision"}
    operators = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in operators
    assert not any(node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize("preprocess", [False, True])
def test_predictions_are_those_of_the_model_on_the_test_part(run: Path, tmp_path: Path, preprocess: bool) -> None:
    file = run / "model.onnx"
    if preprocess:
        file = tmp_path / "whole.onnx"
        words = ["export", str(run / "model.safetensors"), "--out", str(file), "--preprocess"]
        assert CliRunner().invoke(app, words).exit_code == 0
        (taken,) = open_session(file).get_inputs()
        assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [24, 24, 3])
    images = image_files([run.parent / "data" / "test"])
    found = list(predict(file, images, top=2))
    data = load_data(f"imagefolder:{run.parent / 'data'}", seed=0)
    model = compressor.load(run / "model.safetensors")
    with torch.no_grad():
        expected = torch.cat([model(x).softmax(1) for x, _ in data.test.batches(5)])
    assert [each.image for each in found] == [str(path) for path in images]
    for each, row in zip(found, expected, strict=True):
        best = row.argsort(descending=True).tolist()
        assert [name for name, _ in each.classes] == [data.classes[index] for index in best]
        assert [share for _, share in each.classes] == pytest.approx(row[best].tolist(), abs=1e-4)
    right = [Path(each.image).parent.name == each.classes[0][0] for each in found]
    assert sum(right) / len(right) == report.read(run).pruned.accuracy


def test_the_command_prints_a_line_for_each_image(run: Path) -> None:
    photos = run.parent / "data" / "test" / "blue"
    plain = CliRunner().invoke(app, ["predict", str(run / "model.onnx"), str(photos)])
    assert plain.exit_code == 0
    assert len(plain.stdout.splitlines()) == 8
    lines = CliRunner().invoke(app, ["predict", str(run / "model.onnx"), str(photos / "0.png"), "--json", "--top", "9"])
    (seen,) = map(json.loads, lines.stdout.splitlines())
    assert seen["image"].endswith("0.png")
    assert sum(seen["classes"].values()) == pytest.approx(1)
    assert set(seen["classes"]) == {"blue", "red <1>"}


def test_what_cannot_be_used_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    plain = tmp_path / "plain.onnx"
    compressor.export_onnx(nn.Linear(3, 2), plain, torch.zeros(2, 3))
    model, image = run / "model.onnx", run.parent / "data" / "test" / "blue" / "0.png"
    for words, error, message in (
        ([model, tmp_path / "nothing.png"], InputError, "there is no file"),
        ([model, tmp_path / "empty"], InputError, "no image in these folders: give files that end in .bmp"),
        ([model, tmp_path / "broken.png"], DataError, "cannot read image"),
        ([tmp_path / "none.onnx", image], ArtifactError, "there is no file"),
        ([tmp_path / "broken.onnx", image], ArtifactError, "is no ONNX file that onnxruntime can read"),
        ([plain, image], ArtifactError, "does not say 'image_shape' among its metadata"),
    ):
        with pytest.raises(error, match=message):
            list(predict(words[0], image_files(words[1:])))
        said = CliRunner().invoke(app, ["predict", *map(str, words)])
        assert said.exit_code == (1 if error is DataError else 2)


def test_one_broken_image_is_named_and_the_others_are_seen(run: Path, tmp_path: Path) -> None:
    photos = run.parent / "data" / "test" / "blue"
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "1.png").write_bytes((photos / "0.png").read_bytes())
    said = CliRunner().invoke(app, ["predict", str(run), str(tmp_path)])  # of a run folder, its pruned model
    assert said.exit_code == 1
    assert [line.partition(":")[0] for line in said.stdout.splitlines()] == [str(tmp_path / "1.png")]
    assert f"cannot read image {tmp_path / '0.png'}" in said.stderr


def broken_files(folder: Path) -> dict[str, str]:
    """Write ONNX files with something wrong, and return what has to be said of each."""
    compressor.export_onnx(nn.Linear(3, 2), folder / "fine.onnx", torch.zeros(2, 3))
    (folder / "empty.onnx").touch()
    (folder / "cut.onnx").write_bytes((folder / "fine.onnx").read_bytes()[:-40])
    model = onnx.load(folder / "fine.onnx")
    onnx.save(model, folder / "apart.onnx", save_as_external_data=True, location="apart.bin", size_threshold=0)
    (folder / "apart.bin").unlink()
    model = onnx.load(folder / "fine.onnx")
    model.opset_import[0].version = 99
    onnx.save(model, folder / "new.onnx")
    return {
        "empty": "empty.onnx is empty: export it again",
        "cut": "cut.onnx is no ONNX file that onnxruntime can read",
        "apart": "apart.onnx keeps weights in apart.bin, which is not beside it: put it there",
        "new": "new.onnx is of opset 99, which onnxruntime",
    }


def test_what_is_wrong_with_a_file_is_said_by_every_command(tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    image.touch()
    for name, message in broken_files(tmp_path).items():
        file = str(tmp_path / f"{name}.onnx")
        for words in (["benchmark", file], ["predict", file, str(image)], ["export", file, "--precision", "int8"]):
            said = CliRunner().invoke(app, words)
            assert said.exit_code == 2
            assert message in said.stderr
            assert "::" not in said.stderr  # no words of its source code


def test_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for names in ({"input_names": ["a", "b"]}, {"output_names": []}):
        with pytest.raises(InputError, match="give one name for each"):
            compressor.export_onnx(nn.Linear(3, 2), tmp_path / "x.onnx", torch.zeros(2, 3), **names)
    assert not list(tmp_path.iterdir())


# -- the model card


def test_the_card_begins_with_front_matter_and_a_page_of_ones_own_stays(run: Path, tmp_path: Path) -> None:
    card = (run / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert "library_name: compressor" in front
    assert f"value: {report.read(run).pruned.accuracy:.4f}" in front
    assert "compress predict model.onnx photos/" in text
    assert not is_users_own(run / "README.md")
    (tmp_path / "README.md").write_text("# My notes\n")
    report.write(report.read(run), tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My notes\n"


def test_front_matter_is_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    import dataclasses

    made = dataclasses.replace(sample(), name='odd: "name"', settings={"model": "m", "criterion": "l1", "data": "a: b"})
    found = yaml.safe_load(model_card(made).split("---\n")[1])
    assert found["model-index"][0]["name"] == 'odd: "name"'
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == "a: b"


# -- engines


def test_the_doctor_runs_every_engine(monkeypatch) -> None:
    found = {each.engine: each for each in job.doctor.examine()}
    assert found["torch, cpu"].works
    assert found["onnxruntime, cpu"].works
    if not torch.cuda.is_available():
        assert not found["onnxruntime, cuda"].works
        assert "needs a GPU with its driver" in found["onnxruntime, cuda"].says
    monkeypatch.setattr(job.doctor, "has_openvino", lambda: False)
    said = CliRunner().invoke(app, ["doctor"])
    assert said.exit_code == 0
    assert "pip install openvino" in said.stdout


def test_a_run_folder_is_its_two_models(run: Path) -> None:
    said = CliRunner().invoke(app, ["benchmark", str(run), "--batch-size", "1", "--json"])
    assert said.exit_code == 0, said.stderr
    (batch,) = json.loads(said.stdout)["batches"]
    assert list(batch["files"]) == [str(run / "dense.onnx"), str(run / "model.onnx")]


def test_every_sample_can_be_had(run: Path) -> None:
    words = ["benchmark", str(run / "model.onnx"), "--batch-size", "2", "--batch-size", "3", "--json"]
    found = json.loads(CliRunner().invoke(app, words).stdout)
    assert (found["format"], found["machine"]["cores"] > 0) == ("compressor-benchmark", True)
    for size, batch in zip((2, 3), found["batches"], strict=True):
        (each,) = batch["files"].values()
        assert (batch["batch_size"], each["shapes"]) == (size, [[size, 3, 24, 24]])
        assert min(each["samples_ms"]) <= each["p50_ms"] <= max(each["samples_ms"])


@pytest.mark.slow
def test_a_saved_model_is_timed_eager_and_compiled(run: Path) -> None:
    times, _ = job.timed_files.timed([run / "model.safetensors"], 1, "cpu", 1, "", None, ["torch.compile", "torch"])
    assert [name.rpartition(" ")[2] for name in times] == ["(torch)", "(torch.compile)"]
    assert all(each.latency.n > 0 for each in times.values())


def test_an_engine_that_gives_something_else_does_not_work() -> None:
    tried = job.doctor._tried("odd", lambda: torch.ones(2), "install it", torch.zeros(2))
    assert (tried.works, tried.says) == (False, "runs, and gives other results (by 1.0e+00)")


def test_a_file_is_timed_in_several_engines(run: Path) -> None:
    pytest.importorskip("openvino")
    words = ["benchmark", str(run / "model.onnx"), "--batch-size", "2"]
    said = CliRunner().invoke(app, [*words, "--engine", "openvino", "--engine", "onnxruntime"])
    assert said.exit_code == 0, said.stderr
    assert "(openvino)" in said.stdout
    assert "(onnxruntime)" in said.stdout
    for engine, message in (
        ("tensorrt", "TensorRT runs on a GPU: give the device cuda, or another engine for cpu"),
        ("torch.compile", "--engine torch.compile runs .safetensors files, and there is none"),
    ):
        refused = CliRunner().invoke(app, [*words, "--engine", engine])
        assert (refused.exit_code, message in " ".join(refused.stderr.split())) == (2, True)
    wrong = CliRunner().invoke(app, [*words, "--engine", "ncnn"])
    assert wrong.exit_code == 2
    assert "openvino" in wrong.stderr


def test_an_exported_file_is_held_in_openvino_too(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("openvino")
    from compressor.deploy import parity

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval(), torch.randn(2, 3, 8, 8)
    assert "OpenVINO" in compressor.export_onnx(model, tmp_path / "a.onnx", x).providers
    wrong = {"OpenVINO": lambda inputs: [torch.zeros(len(inputs), 5)]}
    monkeypatch.setattr(parity, "_openvino_run", lambda path: wrong)
    with pytest.raises(compressor.errors.ParityError, match="on OpenVINO"):
        compressor.export_onnx(model, tmp_path / "b.onnx", x)


def test_what_openvino_cannot_read_is_compared_without_it(tmp_path: Path, monkeypatch, caplog) -> None:
    from compressor.deploy import parity

    def refuse(path: Path, threads: int) -> None:
        raise ArtifactError("OpenVINO does not read it")

    monkeypatch.setattr(parity, "has_openvino", lambda: True)
    monkeypatch.setattr(parity, "open_openvino", refuse)
    made = compressor.export_onnx(nn.Linear(3, 2), tmp_path / "a.onnx", torch.zeros(2, 3))
    assert "OpenVINO" not in made.providers
    assert "is not compared in OpenVINO: OpenVINO does not read it" in caplog.text
