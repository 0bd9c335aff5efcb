"""Models by name, by import path, and weights from a file that fit or are refused as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.errors import ArtifactError, InputError, RangeError, UnknownNameError
from compressor.training.models import ModelSpec, build, names
from compressor.training.weights import load_weights

# A user's module, as `package.module:factory` finds it on the path.
USER_MODULE = """
from torch import nn

def sized(num_classes): return nn.Linear(4, num_classes)
def any_arguments(**arguments): return nn.Linear(4, arguments["num_classes"])
def fixed(): return nn.Linear(4, 7)
def no_module(): return "a model"
def broken(): raise KeyError("width")
number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Parameter counts of the published architectures (torchvision's documentation), 10 classes for 1000.
@pytest.mark.parametrize(
    ("name", "stem", "size", "count"),
    [
        ("resnet18", "imagenet", 64, 11_689_512 - 513 * 990),
        ("resnet18", "cifar", 32, 11_689_512 - 513 * 990 - 64 * 3 * (49 - 9)),
        ("resnet50", "cifar", 32, 25_557_032 - 2049 * 990 - 64 * 3 * (49 - 9)),
        ("mobilenet_v2", "imagenet", 64, 3_504_872 - 1281 * 990),
        ("googlenet", "imagenet", 64, 6_624_904 - 1025 * 990),
        ("vgg16_bn", "cifar", 32, 14_714_688 + 2 * 4224 + 5130),
    ],
)
def test_published_size_and_output(name: str, stem: str, size: int, count: int) -> None:
    model = build(name, classes=10, stem=stem, seed=0)
    outputs = model(torch.rand(2, 3, size, size))
    assert outputs.shape == (2, 10)
    assert params(model) == count


def test_vgg16_has_134_million_parameters_at_10_classes() -> None:
    with torch.device("meta"):
        assert params(build("vgg16", classes=10)) == 138_357_544 - 4097 * 990


def test_every_name_is_a_classifier() -> None:
    known = names()
    assert {"resnet18", "vgg16", "mobilenet_v2", "densenet121", "googlenet", "inception_v3", "vit_b_16"} <= set(known)
    assert not [name for name in known if "rcnn" in name or "deeplab" in name or "raft" in name]


def test_cifar_stem_keeps_the_resolution() -> None:
    model = build("resnet18", classes=10, stem="cifar")
    assert isinstance(model.maxpool, nn.Identity)
    assert model.conv1(torch.rand(1, 3, 32, 32)).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11", "densenet121"])
def test_in_channels(name: str) -> None:
    model = build(name, classes=3, in_channels=1)
    assert model.eval()(torch.rand(2, 1, 64, 64)).shape == (2, 3)


def test_same_seed_same_weights_and_nothing_else_is_touched() -> None:
    before = torch.get_rng_state()
    first, second, other = (build("squeezenet1_1", classes=2, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_without_a_seed_the_global_generator_is_drawn_from() -> None:
    torch.manual_seed(5)
    first = build("squeezenet1_1", classes=2)
    torch.manual_seed(5)
    second = build("squeezenet1_1", classes=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_spec_survives_json_and_builds_the_same_structure() -> None:
    model = build("resnet18", classes=4, stem="cifar", seed=1)
    spec = ModelSpec(**json.loads(json.dumps(asdict(model.compressor_spec))))
    assert spec == ModelSpec("resnet18", 4, "cifar", 3)
    again = spec.build(seed=1)
    assert again.compressor_spec == spec
    assert "compressor_spec" not in again.state_dict()
    shapes = [tuple(p.shape) for p in model.state_dict().values()]
    assert [tuple(p.shape) for p in again.state_dict().values()] == shapes


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: build("resnet81", classes=10), UnknownNameError, "unknown model 'resnet81': did you mean 'resnet18'"),
        (lambda: build("fasterrcnn_resnet50_fpn", classes=2), UnknownNameError, "unknown model"),
        (lambda: build("resnet18", classes=0), RangeError, "classes = 0 is out of range"),
        (
            lambda: build("resnet18", classes=10, stem="cfar"),
            UnknownNameError,
            "unknown stem 'cfar': did you mean 'cifar'?",
        ),
        (lambda: build("mobilenet_v2", classes=10, stem="cifar"), InputError, "mobilenet_v2 has no cifar stem"),
        (lambda: build("m:f", classes=10, stem="cifar"), InputError, "have no effect on m:f"),
        (lambda: build("m:f", classes=10, in_channels=1), InputError, "have no effect on m:f"),
        (lambda: build("m:", classes=10), InputError, "'m:' is no import path: give package.module:factory"),
        (
            lambda: build("no_such_module:f", classes=10),
            InputError,
            "cannot import 'no_such_module' for no_such_module:f",
        ),
        (lambda: ModelSpec(3, 10), InputError, "factory = 3 is no name"),  # type: ignore[arg-type]
        (lambda: ModelSpec("vgg11", True), RangeError, "classes = True"),
        (lambda: ModelSpec("vgg11", 10, 4), UnknownNameError, "unknown stem '4'"),  # type: ignore[arg-type]
    ],
)
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


# -- the user's own factory


@pytest.mark.parametrize(("factory", "outputs"), [("sized", 5), ("any_arguments", 5), ("fixed", 7)])
def test_user_factory(user_module: str, factory: str, outputs: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    model = build(f"{user_module}:{factory}", classes=5)
    assert model(torch.rand(2, 4)).shape == (2, outputs)
    assert ("takes no num_classes" in caplog.text) == (factory == "fixed")
    assert model.compressor_spec.names_code
    assert not build("squeezenet1_1", classes=2).compressor_spec.names_code


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("sizd", "did you mean 'sized'?"),
        ("number", "unknown factory in module"),
        ("no_module", "gave a str: it must return a torch.nn.Module"),
        ("broken", "broken() failed: KeyError: 'width'"),
    ],
)
def test_user_factory_that_does_not_work(user_module: str, factory: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        build(f"{user_module}:{factory}", classes=5)
    assert message in str(caught.value)


# -- weights


def net(width: int = 3, classes: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, classes))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_come_back(tmp_path: Path, suffix: str) -> None:
    source, model, path = net(), net(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    load_weights(model, path)
    assert same(values(model), values(source))


def test_batch_counters_may_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    source, model = net(), net()
    state = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "old.safetensors")
    load_weights(model, tmp_path / "old.safetensors")
    assert same(values(model), values(source))
    assert "1 BatchNorms keep their own" in caplog.text


def _damaged(path: Path) -> None:
    torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("gone.pt", lambda path: None, "there is no weights file"),
        ("a.onnx", lambda path: path.touch(), "is no weights file: give one that ends in .safetensors, .pt, .pth"),
        ("a.pt", _damaged, "cannot be read"),
        ("a.safetensors", lambda path: path.write_bytes(b"not tensors"), "cannot be read"),
        ("a.pt", lambda path: torch.save(net(), path), "cannot be read"),
        ("a.pt", lambda path: torch.save({"epoch": 3, "net": net().state_dict()}, path), "holds other things"),
        ("a.pt", lambda path: torch.save([1, 2], path), "holds other things"),
        (
            "a.pt",
            lambda path: torch.save({**net(classes=9).state_dict(), "0.weight": torch.zeros(1)}, path),
            "tensor '0.weight' is (1,) in the file and (3, 3, 3, 3) in the model; 6 of the model's 9 tensors",
        ),
        (
            "a.pt",
            lambda path: torch.save({n: t.long() for n, t in net().state_dict().items()}, path),
            "tensor '0.weight' holds whole numbers, and the model real numbers",
        ),
        (
            "a.pt",
            lambda path: torch.save({n: t + 0j for n, t in net().state_dict().items()}, path),
            "tensor '0.weight' holds complex numbers, and the model real numbers",
        ),
        (
            "a.pt",
            lambda path: torch.save({n: t.to_sparse() for n, t in net().state_dict().items()}, path),
            "tensor '0.weight' holds a sparse tensor, and the model real numbers",
        ),
        (
            "a.pt",
            lambda path: torch.save(nn.Sequential(*list(net())[:2]).state_dict(), path),
            "tensor '3.weight' is absent in the file and (2, 3) in the model; 7 of",
        ),
        (
            "a.pt",
            lambda path: torch.save({**net().state_dict(), "head": torch.zeros(4)}, path),
            "tensor 'head' is (4,) in the file and absent in the model; 9 of the model's 9",
        ),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_alone(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    model = net()
    before = values(model)
    write(tmp_path / name)
    with pytest.raises((ArtifactError, InputError)) as caught:
        load_weights(model, tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(values(model), before)


def _wrapped(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path, state: torch.save({"epoch": 3, "model": state, "best": 0.9}, path), "those under 'model'"),
        (lambda path, state: torch.save({"state_dict": state}, path), "those under 'state_dict'"),
        (_wrapped, "names begin with 'module.', which a wrapper put there"),
    ],
)
def test_weights_in_the_usual_wrappings_are_taken_and_it_is_said(write, said, tmp_path, caplog) -> None:
    source, model = net(), net()
    write(tmp_path / "a.pt", source.state_dict())
    load_weights(model, tmp_path / "a.pt")
    assert same(values(model), values(source))
    assert said in caplog.text


def test_a_last_layer_for_other_classes_begins_anew_and_it_is_said(tmp_path, caplog) -> None:
    source, model = net(classes=9), net()
    head = [model[3].weight.detach().clone(), model[3].bias.detach().clone()]
    torch.save(source.state_dict(), tmp_path / "a.pt")
    load_weights(model, tmp_path / "a.pt")
    assert torch.equal(model[0].weight, source[0].weight)
    assert [torch.equal(a, b) for a, b in zip(head, model[3].parameters(), strict=True)] == [True, True]
    assert "'3' has 9 classes there and 2 here; it begins anew" in caplog.text


class Hostile:
    """Would run code when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.marker,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"weight": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pt")
    with pytest.raises(ArtifactError):
        load_weights(net(), tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()
