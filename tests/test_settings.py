"""The options of a run: written and read back, refused when wrong, worked out when left open."""

import dataclasses
import shlex
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.budget import Limits
from compressor.errors import CompressorError, InputError, RangeError, UnknownNameError
from compressor.job import NumberOrAuto, Settings, WholeOrAuto, numbers_or_auto, option_kinds, read_toml

whole = st.integers(min_value=2, max_value=10_000)
part = st.floats(min_value=0, max_value=0.999)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="="), min_size=1, max_size=9).filter(
    lambda word: not word.startswith("-")
)
some = st.one_of(
    st.builds(Settings, first_cut=st.sampled_from([None, 0.0, 0.3]), last_cut=st.sampled_from([None, 0.5, 1.0])),
    st.builds(Settings, model=text, data=text, out=text, sparsity=part, seed=whole, prune_every=st.none() | whole),
    st.builds(
        Settings,
        criterion=st.sampled_from(["l1", "euclidean", "random"]),
        epochs=whole,
        finetune_epochs=st.none() | whole,
        lr=st.floats(min_value=1e-9, max_value=1e9) | st.just("auto"),
        round_to=st.integers(1, 64) | st.just("auto"),
        ema=st.sampled_from([0.0, 0.99]),
        weights=st.sampled_from(["", "default"]),
        data=st.just("cifar10"),
        download=st.booleans(),
        keep=st.tuples() | st.tuples(words, words),
        only=st.tuples() | st.tuples(words),
        sparsity_by_pattern=st.tuples() | st.tuples(st.builds("{}={:g}".format, words, part)),
        verify=st.booleans(),
        compensate=st.sampled_from([None, "mean", "none"]),
        recalibrate=st.none() | whole,
    ),
)


@given(some)
def test_toml_gives_back_the_same_settings(settings: Settings) -> None:
    assert Settings.from_options(tomllib.loads(settings.toml())) == settings


@given(some)
def test_the_command_gives_back_the_same_settings(settings: Settings) -> None:
    words = shlex.split(settings.command())
    assert words[0] == "compress"
    assert Settings.from_options(typed(words[1:])) == settings


def typed(words: list[str]) -> dict[str, object]:
    """What the command line makes of words: lists of what may be repeated, flags that may be negated."""
    found: dict[str, object] = {}
    kinds = {**option_kinds(), "sparsity": list[str]}
    remaining = iter(words)
    for word in remaining:
        name = word.removeprefix("--")
        if kinds.get(name.removeprefix("no-")) is bool:
            found[name.removeprefix("no-")] = not name.startswith("no-")
        elif kinds[name] in (NumberOrAuto, WholeOrAuto):
            found |= numbers_or_auto({name: next(remaining)}, kinds)
        elif kinds[name] == list[str]:
            found[name] = [*found.get(name, []), next(remaining)]
        else:
            found[name] = kinds[name](next(remaining))
    return found


@pytest.mark.parametrize(("criterion", "when"), [("l1", "during"), ("relevance", "after"), ("l1", "after")])
def test_the_command_says_when_where_it_is_not_the_usual(criterion: str, when: str) -> None:
    settings = Settings(criterion=criterion, when=when, sparsity=0.4)
    assert Settings.from_options(typed(shlex.split(settings.command())[1:])) == settings
    assert ("--when" in settings.command()) == ((criterion, when) != ("l1", "after"))


def test_the_command_says_fine_tuning_that_is_usual_for_other_epochs_alone() -> None:
    settings = Settings(criterion="l1", epochs=2, finetune_epochs=Settings(criterion="l1").finetune_epochs)
    assert Settings.from_options(typed(shlex.split(settings.command())[1:])) == settings


def test_the_command_is_short() -> None:
    assert Settings().command() == "compress --criterion relevance --model resnet18 --data digits --sparsity 0.5"


def test_single_groups_are_typed_beside_the_number() -> None:
    words = ["--criterion", "l1", "--sparsity", "0.4", "--sparsity", "layer4.*=0.3", "--keep", "conv1", "--keep", "fc*"]
    settings = Settings.from_options(typed(words))
    assert (settings.sparsity, settings.sparsity_by_pattern) == (0.4, ("layer4.*=0.3",))
    assert settings.limits() == Limits(("conv1", "fc*"), (), {"layer4.*": 0.3})
    assert 'sparsity = [0.4, "layer4.*=0.3"]\n' in settings.toml()
    assert 'keep = ["conv1", "fc*"]\n' in settings.toml()
    assert settings.command().endswith("--sparsity 0.4 --sparsity 'layer4.*=0.3' --keep conv1 --keep 'fc*'")
    assert Settings.from_options({"sparsity": ["a=0.3"]}).sparsity == Settings().sparsity


def test_nothing_is_left_open() -> None:
    watching, after = Settings(), Settings(criterion="l1", epochs=5)
    assert (watching.when, watching.finetune_epochs, watching.relevance_estimator) == ("during", None, "gate")
    assert (after.when, after.finetune_epochs, after.relevance_estimator) == ("after", 3, None)
    assert (watching.first_cut, watching.last_cut, after.first_cut) == (0.1, 0.65, None)
    assert watching.device in ("cpu", "cuda")
    assert (watching.compensate, watching.recalibrate, watching.verify) == ("linear", 0, True)
    assert (after.compensate, after.recalibrate, after.verify) == ("linear", 2000, True)


def test_the_model_as_it_was_teaches_the_smaller_one_where_it_is_trained_on() -> None:
    assert (Settings(criterion="l1").distill, Settings(criterion="l1").temperature) == (0.5, 4.0)
    assert (Settings(criterion="l1", finetune_epochs=0).distill, Settings().distill, Settings().temperature) == (
        0.0,
        0.0,
        None,
    )
    assert Settings(criterion="l1", teacher="large.safetensors").distill == 0.5
    assert Settings(criterion="l1", distill=0.0).temperature is None
    with pytest.raises(InputError, match="--teacher has no effect with --distill 0"):
        Settings(teacher="large.safetensors")


def test_a_network_that_is_trained_already_is_trained_more_gently() -> None:
    new, trained = Settings(), Settings(weights="default")
    assert (new.epochs, new.lr) == (24, 0.05)
    assert (trained.epochs, trained.lr) == (8, pytest.approx(0.01))
    assert (Settings(weights="default", epochs=3, lr=0.5).epochs, Settings(weights="default", lr=0.5).lr) == (3, 0.5)
    assert Settings(criterion="l1", weights="default").finetune_epochs == 4


@pytest.mark.parametrize(
    ("given_", "folder"),
    [
        ({}, "runs/resnet18-digits-relevance-0.5-seed0"),
        ({"data": "imagefolder:/some/photos"}, "runs/resnet18-photos-relevance-0.5-seed0"),
        ({"data": "imagefolder:../photos/", "sparsity": 0.25}, "runs/resnet18-photos-relevance-0.25-seed0"),
        ({"model": "my.nets:tiny", "criterion": "l1"}, "runs/my.nets_tiny-digits-l1-0.5-seed0"),
        ({"out": "here"}, "here"),
    ],
)
def test_the_folder_is_named_after_the_run(given_: dict, folder: str) -> None:
    assert Settings.from_options(given_).out == folder


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"criterion": "relevnce"}, "unknown criterion 'relevnce': did you mean 'relevance'"),
        ({"criterion": "l3"}, "unknown criterion 'l3': did you mean 'l"),
        ({"measure": "param"}, "unknown measure 'param': did you mean 'params'"),
        ({"allocate": "globl"}, "unknown allocation 'globl': did you mean 'global'"),
        ({"stem": "cifr"}, "unknown stem 'cifr': did you mean 'cifar'"),
        ({"when": "afer"}, "unknown when 'afer': did you mean 'after'"),
        ({"relevance-estimator": "sft"}, "unknown relevance estimator 'sft': did you mean 'soft'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"sparsty": 0.5}, "unknown option 'sparsty': did you mean 'sparsity'"),
        ({"compensate": "means"}, "unknown compensate 'means': did you mean 'mean'"),
        ({"criterion": "tp:GroupTailorImportance"}, "unknown criterion 'tp:GroupTailorImportance': did you mean 'tp:G"),
        ({"sparsity-by-pattern": ["a=0.3"]}, "unknown option 'sparsity-by-pattern': did you mean 'sparsity'"),
        ({"round_to": 4}, "unknown option 'round_to': did you mean 'round-to'"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(given_: dict, message: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        Settings.from_options(given_)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("sparsity", float("nan")),
        ("round-to", 0),
        ("recalibrate", 1),
        ("recalibrate", -1),
        ("epochs", 0),
        ("batch-size", 1),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("drop", 0.6),
        ("confidence", 0.0),
        ("confidence", 1.01),
        ("dummies", 9),
        ("dummies", 10**9),
        ("epochs", 10**7),
        ("round-to", 10**20),
        ("batch-size", 10**20),
        ("warmup", -1),
        ("prune-every", 0),
        ("seed", -1),
    ],
)
def test_a_number_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(RangeError, match=rf"^{name} = {value} is out of range: give {name} in "):
        Settings.from_options({name: value})


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"when": "after", "drop": 0.2}, "--drop has no effect with --when after"),
        (
            {"criterion": "set", "when": "after"},
            "--criterion set changes its masks in training: leave out --when after",
        ),
        (
            {"first-cut": 0.9},
            "first-cut = 0.9 is out of range: give first-cut in [0, 0.65): it comes before end = 0.65",
        ),
        ({"first-cut": 0.2, "criterion": "l1"}, "--first-cut has no effect with --when after"),
        ({"last-cut": 0.9, "criterion": "rigl"}, "--last-cut has no effect with --criterion rigl"),
        ({"epochs": 0}, "epochs = 0 is out of range: give epochs in 1, 2, 3, ...; 0 with --when after"),
        ({"rounds": 3}, "--rounds has no effect with --when during"),
        ({"criterion": "l1", "rounds": 0}, "rounds = 0 is out of range: give rounds in 1 to 1000"),
        (
            {"criterion": "l1", "allocate": "relevance", "when": "during"},
            "--allocate relevance needs --when after with --crit",
        ),
        ({"finetune-epochs": 2}, "--finetune-epochs has no effect with --when during"),
        (
            {"criterion": "l1", "when": "during", "finetune-epochs": 2},
            "--finetune-epochs has no effect with --when during",
        ),
        ({"criterion": "l1", "drop": 0.1}, "--drop has no effect with --criterion l1"),
        ({"criterion": "l1", "dummies": 50}, "--dummies has no effect with --criterion l1"),
        ({"criterion": "l1", "warmup": 0}, "--warmup has no effect with --criterion l1"),
        ({"criterion": "l1", "relevance-estimator": "soft"}, "--relevance-estimator has no effect with --criterion l1"),
        ({"criterion": "l1", "prune-every": 5}, "--prune-every has no effect with --when after"),
        ({"criterion": "set", "verify": False}, "--no-verify has no effect with --criterion set"),
        ({"criterion": "set", "compensate": "none"}, "--compensate has no effect with --criterion set"),
        ({"criterion": "rigl", "keep": ["conv1"]}, "--keep has no effect with --granularity weight"),
        (
            {"criterion": "rigl", "sparsity": ["a=0.3"]},
            "--sparsity PATTERN=... has no effect with --granularity weight",
        ),
        ({"download": True}, "--download has no effect with --data digits"),
    ],
)
def test_a_setting_without_effect_is_refused(given_: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings.from_options(given_)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"epochs": "ten"}, "epochs = 'ten' in exp.toml: give a whole number"),
        ({"epochs": True}, "epochs = True in exp.toml: give a whole number"),
        ({"lr": True}, "lr = True in exp.toml: give a number"),
        ({"epochs": 1.5}, "epochs = 1.5 in exp.toml: give a whole number"),
        ({"sparsity": "0.5"}, "sparsity = '0.5' in exp.toml: give a number"),
        ({"keep": "conv1"}, "keep = 'conv1' in exp.toml: give a list of texts"),
        ({"keep": ["conv1", 2]}, "keep = ['conv1', 2] in exp.toml: give a list of texts"),
        ({"sparsity": ["much"]}, "sparsity = 'much' in exp.toml: give a number"),
        ({"sparsity": [0.3, 0.4]}, "sparsity = [0.3, 0.4] in exp.toml: give one number, and PATTERN=NUMBER for single"),
        ({"sparsity": [0.3, "a=1"]}, "sparsity = 'a=1' in exp.toml: give PATTERN=NUMBER with a number in [0, 1)"),
        ({"sparsity": ["a=b"]}, "sparsity = 'a=b' in exp.toml: give PATTERN=NUMBER with a number in [0, 1)"),
        ({"download": 1}, "download = 1 in exp.toml: give true or false"),
        ({"model": 18}, "model = 18 in exp.toml: give text in quotes"),
        ({"sparsty": 1}, "unknown option in exp.toml 'sparsty': did you mean 'sparsity'"),
    ],
)
def test_a_wrong_value_in_a_file_names_the_file(given_: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings.from_options(given_, "exp.toml")
    assert str(caught.value).startswith(message)


def test_a_pattern_with_two_shares_is_refused() -> None:
    with pytest.raises(InputError, match=r"--sparsity a came with 0.3 and 0.4: leave one of them out"):
        Settings.from_options({"sparsity": ["a=0.3", "a=0.4"]})


def test_a_file_that_is_missing_or_no_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("sparsity 0.5")
    (tmp_path / "latin.toml").write_bytes(b"data = '\xe9'")
    for name, message in (
        ("none.toml", "cannot read .*No such file"),
        ("bad.toml", "no TOML"),
        ("latin.toml", "no TOML"),
    ):
        with pytest.raises(InputError, match=message):
            read_toml(tmp_path / name)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().epochs = 3  # type: ignore[misc]


def test_a_latency_is_asked_for_with_its_place() -> None:
    settings = Settings(measure="latency", target_batch=8, when="after", criterion="l1")
    assert (settings.target_engine, settings.target_batch, settings.target_threads) == ("onnxruntime", 8, 1)
    budget = settings.budget()
    assert budget.counts == "latency"
    assert budget.measure.place.batch == 8
    assert Settings.from_options(settings.given()) == settings
    assert "--measure latency" in settings.command()
    assert "--target-batch 8" in settings.command()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_batch": 8}, "--target-batch has no effect with --measure params"),
        ({"measure": "latency", "target_batch": 0}, "target-batch = 0 is out of range"),
        ({"measure": "latency", "target_engine": "ncnn"}, "onnxruntime"),
        ({"measure": "latency", "target_device": "tpu"}, "unknown .*device .tpu."),
        ({"measure": "latency", "target_device": "cuda"}, "in torch only, not in onnxruntime: give torch"),
        ({"target_device": "cuda"}, "--target-device has no effect with --measure params"),
        ({"measure": "time"}, "latency"),
        ({"precision": "int4"}, "int8"),
        ({"tolerance": 0.1}, "--tolerance has no effect with --precision fp32"),
        ({"precision": "int8", "tolerance": 1.0}, "tolerance = 1.0 is out of range"),
    ],
)
def test_odd_places_and_precisions_are_refused(given: dict, message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        Settings(**given)


def test_a_latency_on_a_gpu_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = {"measure": "latency", "target_engine": "torch", "target_device": "cuda", "when": "after"}
    with pytest.raises(InputError, match="--target-device cuda: this machine has no usable GPU; give --target-device"):
        Settings(criterion="l1", **asked)


def test_bfloat16_is_refused_where_nothing_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"criterion": "l1", "device": "cpu", "amp": True}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"bf16": True}, raising=False)
    assert Settings.from_options(asked).training().amp
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": False, "avx2": True}, raising=False)
    with pytest.raises(InputError, match=r"--amp: cpu has no bfloat16 instructions .*; leave --amp out"):
        Settings.from_options(asked)
