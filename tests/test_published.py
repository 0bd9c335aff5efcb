"""Models and weights of torchvision and timm: taken up by name, normalised as they expect it, refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from compressor import job
from compressor.deploy import describe, load
from compressor.errors import InputError, UnknownNameError
from compressor.job import Settings
from compressor.training import fit_weights, load_data, models, published_weights

NAME = "timm:test_resnet"  # 476 thousand parameters, which timm has for tests


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    """Let the libraries hand out weights of their own making in place of a download."""
    torch.manual_seed(7)
    made = {"torchvision": torchvision.models.squeezenet1_1(), "timm": timm.create_model("test_resnet")}
    create = timm.create_model

    def pretrained(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
        return made["timm"] if pretrained else create(name, pretrained=False, **arguments)

    monkeypatch.setattr(
        "torchvision.models.WeightsEnum.get_state_dict", lambda self, **how: made["torchvision"].state_dict()
    )
    monkeypatch.setattr("timm.create_model", pretrained)
    return made


@pytest.mark.parametrize(("name", "library"), [("squeezenet1_1", "torchvision"), (NAME, "timm")])
def test_published_weights_are_those_of_the_library_but_for_the_head(
    name: str, library: str, offline: dict[str, nn.Module]
) -> None:
    published = published_weights(name)
    model = models.build(name, classes=10, seed=0)
    head = {"squeezenet1_1": "classifier.1.", NAME: "fc."}[name]
    own = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(head)}
    fit_weights(model, published.tensors, "here")
    theirs = offline[library].state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key] if key in own else theirs[key]), key
    assert own
    # Both libraries were trained on pixels in 0 to 1 with ImageNet's mean, in whose unit it is 0.485.
    if library == "torchvision":
        assert published.mean == pytest.approx([255 * 0.485, 255 * 0.456, 255 * 0.406])


@pytest.mark.slow
def test_a_run_begins_with_published_weights_and_their_normalisation(
    offline: dict[str, nn.Module], tmp_path: Path
) -> None:
    settings = Settings.from_options({
        "model": NAME, "weights": "default", "criterion": "l1", "sparsity": 0.2, "epochs": 0, "finetune-epochs": 0,
        "recalibrate": 0, "compensate": "none", "out": str(tmp_path / "run"),
    })  # fmt: skip
    assert settings.lr == pytest.approx(0.01)  # a fifth of what a network from nothing gets
    made = job.run(settings, timings=False)
    assert made.goal.met
    dense = load(tmp_path / "run/dense.safetensors")  # by its name alone: timm's code is not the user's
    theirs = offline["timm"].state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in dense.state_dict().items() if "fc." not in key)
    cfg = timm.get_pretrained_cfg("test_resnet")
    saved = describe(tmp_path / "run/model.safetensors").extra
    assert saved["mean"] == pytest.approx([255 * each for each in cfg.mean])
    assert saved["std"] == pytest.approx([255 * each for each in cfg.std])


@pytest.mark.parametrize("name", ["squeezenet1_1", NAME])
def test_without_a_network_one_line_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **how: object) -> None:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", fails)
    monkeypatch.setattr("timm.create_model", fails)
    with pytest.raises(InputError, match=r"weights of .* \(OSError: no route to host\): .*--weights FILE$"):
        published_weights(name)


def test_a_users_own_model_has_no_published_weights() -> None:
    with pytest.raises(InputError, match="user_models:tiny is neither"):
        published_weights("user_models:tiny")


@pytest.mark.parametrize("name", ["timm:resnet19", "timm:hf-hub:somebody/something", "timm:local-dir:/tmp"])
def test_timm_gives_only_models_that_it_lists(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown timm model"):
        models.build(name, classes=10)


def test_a_timm_name_may_say_which_weights() -> None:
    assert models.build(f"{NAME}.r160_in1k", classes=10)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_timm_model_has_no_cifar_stem_and_any_channels() -> None:
    with pytest.raises(InputError, match="has no cifar stem"):
        models.build(NAME, classes=10, stem="cifar")
    assert models.build(NAME, classes=10, in_channels=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_normalised_images_have_the_mean_that_was_asked_for() -> None:
    data = load_data("digits")
    other = data.normalised((0.0,) * 3, (255.0,) * 3)
    (images, targets), (before, same) = (next(iter(each.test.batches(16))) for each in (other, data))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.test.mean, data.test.std))
    torch.testing.assert_close(255 * images, before * std + mean, atol=1e-3, rtol=0)
    assert torch.equal(targets, same)
    with pytest.raises(InputError, match="images of 3 channels"):
        data.normalised((0.0,), (1.0,))
