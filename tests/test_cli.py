"""The command line: what it prints, and that bad input gets one clear line, exit code 2, and changes nothing."""

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sample_report import sample
from typer.testing import CliRunner
from user_models import tiny

import compressor
from compressor import cli, job, report
from compressor.deploy import save
from compressor.errors import CompressorError, InputError
from compressor.job import Settings, option_kinds
from compressor.report import Goal, Report
from compressor.surgery import cut
from compressor.training import models


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def compress(*words: str):
    result = CliRunner().invoke(cli.app, list(words), prog_name="compress")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def files_in(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, but for the lock of a run."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(folder / name)


# -- help


def test_help_does_not_import_torch_or_the_plotting_and_data_libraries() -> None:
    line = [sys.executable, "-X", "importtime", "-m", "compressor", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert "compressor.cli" in imported
    assert not imported & {"torch", "numpy", "torchvision", "onnx", "onnxruntime", "sklearn", "jinja2"}
    assert "--criterion" in done.stdout


def test_help_names_every_option_and_command() -> None:
    shown = compress("--help").stdout
    for name in [*option_kinds(), "config", "resume", "overwrite"]:
        assert f"--{name} " in shown
    for name in ("inspect", "export", "benchmark", "report"):
        assert f" {name} " in shown


def test_without_arguments_there_is_help_and_nothing_is_run(tmp_path: Path) -> None:
    result = compress()
    assert "Usage" in result.output
    assert files_in(tmp_path) == {}


# -- the main job


class Called(Exception):
    """Stands in for the job, and carries what it was asked for."""


def asked(monkeypatch, *words: str) -> tuple[Settings, dict]:
    def run(settings: Settings, **how: object) -> Report:
        raise Called(settings, how)

    monkeypatch.setattr(job, "run", run)
    with pytest.raises(Called) as caught:
        compress(*words)
    return caught.value.args


def test_options_become_settings(monkeypatch) -> None:
    settings, how = asked(
        monkeypatch,
        "--criterion",
        "l1",
        "--sparsity",
        "0.4",
        "--round-to",
        "1",
        "--epochs",
        "7",
        "--out",
        "here",
        "--overwrite",
    )
    wanted = {"criterion": "l1", "sparsity": 0.4, "round-to": 1, "epochs": 7, "out": "here"}
    assert settings == Settings.from_options(wanted)
    assert (how["resume"], how["overwrite"]) == (False, True)


@pytest.mark.parametrize(
    "more",
    [
        {"data": "cifar10", "download": True, "lr": 1e-5, "finetune_epochs": 0},
        {"keep": ("conv1", "layer[12].*"), "only": ("*",), "sparsity_by_pattern": ("layer4.*=0.3", "fc=0")},
        {"verify": False, "compensate": "none", "recalibrate": 500},
        {"decay_norms": False, "checkpoint_every": 7, "clip_norm": 1.0},
    ],
)
def test_the_command_in_the_report_is_understood(monkeypatch, more: dict) -> None:
    settings = Settings(criterion="l2", model="a b", **more)
    assert asked(monkeypatch, *shlex.split(settings.command())[1:])[0] == settings


def test_what_was_written_for_a_run_goes_on_with_it(monkeypatch, tmp_path: Path) -> None:
    line = shlex.split("--criterion l1 --sparsity 0.4 --sparsity layer4.*=0.3 --keep conv1 --no-verify --out run")
    settings, _ = asked(monkeypatch, *line)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(settings.toml())
    assert asked(monkeypatch, "--resume", "--out", "run")[0] == settings
    assert asked(monkeypatch, "--resume", *line)[0] == settings
    other = compress("--resume", "--out", "run", "--keep", "conv2")
    assert (other.exit_code, "has --keep ['conv1'], not ['conv2']" in other.stderr) == (2, True)


def test_options_on_the_line_win_over_the_file(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "exp.toml").write_text('criterion = "l1"\nepochs = 7\nlr = 0.1\n')
    settings, _ = asked(monkeypatch, "--config", "exp.toml", "--epochs", "2")
    assert settings == Settings.from_options({"criterion": "l1", "epochs": 2, "lr": 0.1})


def test_resume_takes_the_settings_of_the_run(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    begun = Settings.from_options({"criterion": "l1", "epochs": 7, "lr": 0.1, "out": "run"})
    (tmp_path / "run" / "config.toml").write_text(begun.toml())
    settings, how = asked(monkeypatch, "--resume", "--out", "run")
    assert settings == begun
    assert how["resume"]


def test_the_result_is_a_table_a_sentence_and_where_the_files_are(monkeypatch) -> None:
    monkeypatch.setattr(job, "run", lambda settings, **how: sample())
    result = compress("--out", "runs/demo")
    assert result.exit_code == 0
    assert "runs/demo/model.safetensors" not in result.stdout  # tidied up since
    files_there(Path("runs/demo"), "model.safetensors", "report.html")
    result = compress("--out", "runs/demo")
    for shown in ("dense", "pruned", "98.00%", "97.00%", "-60.0%", "2.00× as fast", "note: ran on one core"):
        assert shown in result.stdout
    assert "60.0% of the params removed, 60.0% asked" in result.stdout
    assert "runs/demo/model.safetensors" in result.stdout
    assert "runs/demo/report.html" in result.stdout
    assert "runs/demo/model.onnx" not in result.stdout
    assert compress("--out", "runs/demo", "--quiet").stdout == ""


def files_there(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def test_a_target_that_was_not_reached_is_an_exit_code(monkeypatch) -> None:
    missed = Report(**{**vars(sample()), "goal": Goal("params", 0.6, 0.5, ("conv1 is at its floor",), met=False)})
    monkeypatch.setattr(job, "run", lambda settings, **how: missed)
    result = compress("--out", "here")
    assert result.exit_code == 1
    assert "note: conv1 is at its floor" in result.stdout
    assert "not reached" in result.stderr


def test_an_interrupted_run_says_how_to_go_on(monkeypatch) -> None:
    def run(settings: Settings, **how: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", run)
    result = compress("--out", "my runs/a")
    assert (result.exit_code, result.stderr) == (130, "compress: stopped; nothing was written\n")
    files_there(Path("my runs/a"), "config.toml")
    result = compress("--out", "my runs/a")
    assert (result.exit_code, result.stderr) == (
        130,
        "compress: stopped; go on with: compress --resume --out 'my runs/a'\n",
    )


def test_the_version_is_printed() -> None:
    result = compress("--version")
    assert (result.exit_code, result.stdout) == (0, f"compressor {importlib.metadata.version('compressor')}\n")


def test_what_a_file_says_does_nothing_to_the_terminal(monkeypatch) -> None:
    def run(settings: Settings, **how: object) -> Report:
        raise InputError("the factory '\x1b[31mred\x07' is unknown")

    monkeypatch.setattr(job, "run", run)
    assert compress("--out", "here").stderr == "compress: the factory '\\x1b[31mred\\x07' is unknown\n"


# -- bad input: one clear line, exit code 2, nothing changed


def nothing(folder: Path) -> None:
    """Lay nothing out."""


def data_without_images(folder: Path) -> None:
    (folder / "photos" / "train" / "cat").mkdir(parents=True)
    images(folder / "photos", "test/cat/1.png", "train/dog/1.png", "test/dog/1.png")


def data_with_a_broken_image(folder: Path) -> None:
    names = [f"{part}/{kind}/{n}.png" for part in ("train", "test") for kind in ("cat", "dog") for n in range(3)]
    images(folder / "photos", *names)
    (folder / "photos/train/dog/1.png").write_bytes(b"no image")


def weights_of_another_model(folder: Path) -> None:
    save_file(models.build("resnet34", classes=10, seed=0).state_dict(), folder / "other.safetensors")


def damaged_weights(folder: Path) -> None:
    (folder / "other.safetensors").write_bytes(b"\x08\x00")


def a_run(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text(Settings(criterion="l1", out="run").toml())
    (folder / "run" / "model.onnx").write_text("old")


def a_folder_of_mine(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("mine")


def a_config_with_a_typing_error(folder: Path) -> None:
    (folder / "exp.toml").write_text("sparsty = 0.4\n")


BAD: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "criterion": (nothing, "--criterion relevanse", "unknown criterion 'relevanse': did you mean 'relevance'"),
    "model": (nothing, "--model resnet81", "unknown model 'resnet81': did you mean 'resnet18'"),
    "own model": (nothing, "--model nowhere:net", "cannot import 'nowhere' for nowhere:net"),
    "data": (nothing, "--data digit", "unknown data set 'digit': did you mean 'digits'"),
    "sparsity 1": (nothing, "--sparsity 1", "sparsity = 1.0 is out of range: give sparsity in [0, 1)"),
    "sparsity -0.1": (nothing, "--sparsity -0.1", "sparsity = -0.1 is out of range"),
    "sparsity twice": (nothing, "--sparsity 0.5 --sparsity 0.6", "sparsity = [0.5, 0.6]: give one number, and PATTERN"),
    "sparsity of a group": (nothing, "--sparsity conv1=1.5", "sparsity = 'conv1=1.5': give PATTERN=NUMBER with"),
    "no such group": (nothing, "--model user_models:tiny --keep 77", "unknown group for keep '77': did you mean '7'"),
    "no such group to cut": (nothing, "--model user_models:tiny --only 33", "unknown group for only '33': did you"),
    "contradiction": (
        nothing,
        "--model user_models:tiny --keep 3 --sparsity 3=0.5",
        "sparsity 3=0.5 and keep 3 contradict each other at group '3'",
    ),
    "kept whole": (nothing, "--model user_models:tiny --only 0 --sparsity 0.5", "cannot remove 50.0% of the params"),
    "importance": (nothing, "--criterion tp:GroupTailor", "unknown criterion 'tp:GroupTailor': did you mean 'tp:G"),
    "measure": (nothing, "--measure flops", "unknown measure 'flops'"),
    "device": (nothing, "--device cuda:99", "unknown device 'cuda:99'"),
    "no folder": (nothing, "--data imagefolder:photos", "there is no data folder photos"),
    "no images": (data_without_images, "--data imagefolder:photos", "no images in photos/train/cat"),
    "broken image": (data_with_a_broken_image, "--data imagefolder:photos", "cannot read image photos/train/dog/1.png"),
    "not downloaded": (nothing, "--data cifar10", "cifar10 cannot be loaded"),
    "weights": (weights_of_another_model, "--weights other.safetensors", "other.safetensors belongs to another model"),
    "damaged weights": (damaged_weights, "--weights other.safetensors", "other.safetensors cannot be read"),
    "no weights": (nothing, "--weights none.pt", "there is no weights file none.pt"),
    "run there": (a_run, "--out run", "run folder run is there already: --resume goes on with it, --overwrite"),
    "mine": (a_folder_of_mine, "--out run", "run is there and is no run folder of compress"),
    "overwrite mine": (a_folder_of_mine, "--out run --overwrite", "run is there and is no run folder of compress"),
    "resume mine": (a_folder_of_mine, "--out run --resume", "run holds no run to go on with"),
    "resume other": (a_run, "--out run --resume --criterion l2", "the run in run has --criterion l1, not l2"),
    "both": (a_run, "--out run --resume --overwrite", "--resume and --overwrite contradict each other"),
    "config": (a_config_with_a_typing_error, "--config exp.toml", "unknown option in exp.toml 'sparsty': did you mean"),
    "no config": (nothing, "--config none.toml", "cannot read none.toml"),
    "no effect": (nothing, "--criterion l1 --drop 0.2", "--drop has no effect with --criterion l1"),
    "cannot be reached": (nothing, "--model user_models:baked --sparsity 0.9", "cannot remove 90.0% of the params"),
    "too much": (nothing, "--model user_models:tiny --sparsity 0.99", "cannot remove 99.0% of the params: at most"),
    "criterion blind": (nothing, "--model user_models:plain --criterion bn_scale", "no usable scores for group '0'"),
    "classes": (a_run, "--model user_models:seven --out run --overwrite", "Sequential gives (1, 7) for one image"),
    "misplaced": (nothing, "--sparsity 0.4 report run", "--sparsity before 'report' has no effect"),
    "inspect": (nothing, "inspect resnet81", "unknown model 'resnet81': did you mean 'resnet18'"),
    "inspect file": (nothing, "inspect none.safetensors", "none.safetensors is missing"),
    "export": (damaged_weights, "export other.safetensors", "other.safetensors is damaged, or no safetensors file"),
    "export ending": (a_run, "export run/model.safetensors --out run/config.toml", "--out run/config.toml is not the"),
    "export itself": (a_run, "export run/m.safetensors --out run/m.safetensors", "--out run/m.safetensors is not"),
    "benchmark": (nothing, "benchmark none.onnx", "there is no file none.onnx"),
    "benchmark kind": (a_run, "benchmark run/config.toml", "run/config.toml is no model file"),
    "benchmark damaged": (a_run, "benchmark run/model.onnx", "run/model.onnx is no ONNX file"),
    "precision": (nothing, "--model user_models:half", "'0.weight' of user_models:half is torch.float16, and images"),
    "all classes": (nothing, "inspect resnet18 --classes 1000000000", "classes = 1000000000 is out of range: give"),
    "large images": (nothing, "inspect resnet18 --image-size 200000", "inputs of 1 x 3 x 200000 x 200000 need about"),
    "report": (a_run, "report run", "run holds no report.json; give the folder of a finished run"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_exit_code_2_and_nothing_changed(case: str, tmp_path: Path) -> None:
    lay_out, line, message = BAD[case]
    lay_out(tmp_path)
    before = files_in(tmp_path)
    result = compress(*line.split())
    assert result.exit_code == 2
    assert result.stderr.startswith(f"compress: {message}")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert files_in(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_a_sparsity_that_cannot_be_reached_says_what_blocks_it() -> None:
    result = compress("--model", "user_models:tiny", "--sparsity", "0.99")
    first, *blocked = result.stderr.splitlines()
    assert "ask for a sparsity of 0." in first
    assert blocked
    assert all(line.startswith("  - ") for line in blocked)


@pytest.mark.parametrize("words", [["--epochs", "many"], ["--sparsty", "0.5"], ["inspekt", "resnet18"], ["export"]])
def test_what_cannot_be_parsed_is_exit_code_2(words: list[str], tmp_path: Path) -> None:
    result = compress(*words)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert files_in(tmp_path) == {}


def test_any_error_of_ours_is_caught_and_no_other(monkeypatch) -> None:
    def fail(error: Exception) -> Callable[..., Report]:
        def run(settings: Settings, **how: object) -> Report:
            raise error

        return run

    monkeypatch.setattr(job, "run", fail(CompressorError("so it is")))
    assert compress("--out", "here").stderr == "compress: so it is\n"
    monkeypatch.setattr(job, "run", fail(ZeroDivisionError("a fault of the program")))
    with pytest.raises(ZeroDivisionError):
        compress("--out", "here")


# -- the parts


def test_inspect_shows_groups_and_frozen_dimensions() -> None:
    result = compress("inspect", "user_models:tiny", "--image-size", "32")
    assert result.exit_code == 0
    graph = compressor.trace(tiny(10), torch.zeros(1, 3, 32, 32))
    for word in [*(group.name for group in graph.groups), *(each.tensor for each in graph.frozen)]:
        assert word in result.stdout


def test_inspect_as_json_is_the_channel_graph() -> None:
    found = json.loads(compress("inspect", "user_models:tiny", "--image-size", "32", "--json").stdout)
    model = tiny(10)
    graph = compressor.trace(model, torch.zeros(1, 3, 32, 32))
    assert found["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert {group["name"]: group["channels"] for group in found["groups"]} == graph.sizes()
    assert [each["reason"] for each in found["frozen"]] == [each.reason for each in graph.frozen]
    # one channel of the first convolution: its kernel, BatchNorm's scale and shift, and the next kernel's slices
    assert found["groups"][0]["params_per_channel"] == 3 * 9 + 2 + 32 * 9


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = models.build("user_models:tiny", classes=10, seed=0)
    graph = compressor.trace(model, torch.zeros(1, 3, 32, 32))
    cut(graph, {graph.groups[0].name: [0, 3, 5, 6]})
    path = tmp_path / "small.safetensors"
    save(model, path, extra={"image_shape": [3, 32, 32]})
    return path


def test_a_file_is_opened_only_with_the_factory_that_the_caller_names(saved: Path) -> None:
    refused = compress("inspect", "small.safetensors")
    assert refused.exit_code == 2
    assert "give --factory package.module:factory (it names user_models:tiny)" in refused.stderr
    shown = compress("inspect", "small.safetensors", "--factory", "user_models:tiny", "--json")
    assert json.loads(shown.stdout)["groups"][0]["channels"] == 4


def test_export_and_benchmark_take_what_was_saved(saved: Path, tmp_path: Path) -> None:
    result = compress("export", "small.safetensors", "--factory", "user_models:tiny")
    assert result.exit_code == 0
    assert result.stdout.startswith("small.onnx: ")
    words = "benchmark small.onnx small.safetensors --factory user_models:tiny --batch-size 1 --batch-size 3"
    shown = compress(*words.split()).stdout
    assert "batch 1, cpu, 1 thread" in shown
    assert "batch 3, cpu, 1 thread" in shown
    assert shown.count("small.onnx") == shown.count("small.safetensors") == 2


def onnx_file(path: Path, **inputs: tuple[int, list[int | str | None]]) -> None:
    """Write an ONNX file that hands its inputs on as floats; each has a type and a shape."""
    from onnx import TensorProto, helper, save

    ends = [(name, f"{name}_out", kind, shape) for name, (kind, shape) in inputs.items()]
    graph = helper.make_graph(
        [helper.make_node("Cast", [name], [out], to=TensorProto.FLOAT) for name, out, _, _ in ends],
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, _, kind, shape in ends],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, shape) for _, out, _, shape in ends],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


FLOAT, UINT8, INT64, FLOAT16, BFLOAT16 = 1, 2, 7, 10, 16
OTHERS = {  # what is in the file, what is typed, and the inputs that it gets or what is said
    "scalar": ({"x": (FLOAT, ["b", 3, 8, 8]), "s": (FLOAT, [])}, "", "1x3x8x8, 1"),
    "fixed batch": ({"x": (FLOAT, [4, 3, 8, 8])}, "", "input 'x' of m.onnx is (4, 3, 8, 8), with a fixed batch: g"),
    "its batch": ({"x": (FLOAT, [4, 3, 8, 8])}, "--batch-size 4", "4x3x8x8"),
    "fixed size": ({"x": (FLOAT, ["b", 3, 8, 8])}, "--image-size 9", "input 'x' of m.onnx is (b, 3, 8, 8), with a f"),
    "any size": ({"x": (FLOAT, ["b", 3, "h", "w"])}, "", "input 'x' of m.onnx is (b, 3, h, w), and its height an"),
    "a size": ({"x": (FLOAT, ["b", 3, "h", "w"])}, "--image-size 9", "1x3x9x9"),
    "channels last": ({"x": (UINT8, [None, None, None, 3])}, "--image-size 9", "1x9x9x3"),
    "half": ({"x": (FLOAT16, ["b", 3, 8, 8])}, "", "1x3x8x8"),
    "text": ({"ids": (INT64, ["b", 16]), "mask": (INT64, ["b", 16])}, "--batch-size 2", "2x16, 2x16"),
    "any length": ({"ids": (INT64, ["b", "s"])}, "", "input 'ids' of m.onnx is (b, s), and nothing says how long d"),
    "odd type": ({"x": (BFLOAT16, ["b", 3])}, "", "input 'x' of m.onnx is tensor(bfloat16): only inputs of floats"),
    "no memory": ({"x": (FLOAT, ["b", 99])}, "--batch-size 99999999999", "inputs of 99999999999 x 99 need about"),
    "threads": ({"x": (FLOAT, ["b", 99])}, "--threads 99999", "threads = 99999 is out of range: give threads in 1 to"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_files_of_others_are_fed_what_they_declare(case: str, tmp_path: Path) -> None:
    inputs, words, expected = OTHERS[case]
    onnx_file(tmp_path / "m.onnx", **inputs)
    result = compress("benchmark", "m.onnx", *(words if "batch" in words else f"--batch-size 1 {words}").split())
    if result.exit_code:
        assert result.exit_code == 2
        assert result.stderr.startswith(f"compress: {expected}")
    else:
        assert expected in result.stdout


def test_report_renders_again_what_is_in_the_json(tmp_path: Path) -> None:
    report.write(sample(), tmp_path)
    before = files_in(tmp_path)
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.md").write_text("old")
    result = compress("report", ".")
    assert result.exit_code == 0
    assert result.stdout.split() == ["report.html", "report.md", "README.md"]
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--help"], ["-m", "compressor"]),
        (["--help"], [str(Path(sys.executable).with_name("compress"))]),
        (["benchmark", "none.onnx"], ["-m", "compressor"]),
        pytest.param(
            ["inspect", "resnet18", "--image-size", "32"],
            [str(Path(sys.executable).with_name("compress"))],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_file_of_the_present_folder_runs(words: list[str], start: list[str], tmp_path: Path) -> None:
    for name in ("attr", "dill", "pynvml", "lazy_loader", "typer", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({name!r}, 'w').close()\n")
    subprocess.run([sys.executable, *start, *words], cwd=tmp_path, check=False, capture_output=True)
    assert not [each.name for each in tmp_path.iterdir() if not each.suffix]


def test_a_factory_that_is_named_is_found_in_the_present_folder(tmp_path: Path) -> None:
    (tmp_path / "widths.py").write_text("WIDTH = 8\n")
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef net():\n    from widths import WIDTH\n"
        "    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, 2, 3))\n"
    )
    before = list(sys.path)
    result = compress("inspect", "nets:net", "--image-size", "16")
    assert result.exit_code == 0
    assert sys.path == before


@pytest.mark.parametrize(
    "extra", [{"image_shape": 5}, {"image_shape": [3, -1, 4]}, {"image_shape": [3, 1e9, 4]}, {"classes": {"a": 1}}]
)
def test_odd_things_that_a_file_says_of_its_data_are_refused(extra: dict, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(tiny(10), path, extra=extra)
    result = compress("export", str(path), "--factory", "user_models:tiny")
    assert result.exit_code == 2
    assert "says odd things of its data" in result.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["inspect", "alexnet", "--image-size", "64"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_output_that_cannot_be_written_is_one_line_and_an_exit_code(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "compressor", *words]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 1
    assert re.fullmatch(r"compress: cannot write[a-z ]*: No space left on device\n", found.stderr)
