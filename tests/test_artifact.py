"""A saved model comes back bit for bit; a file that is damaged, foreign or hostile is refused in one line."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import random_keep
from safetensors import safe_open
from torch import Tensor, nn

from compressor.deploy.artifact import describe, load, save
from compressor.deploy.model_file import FORMAT, checksum
from compressor.errors import ArtifactError, InputError
from compressor.graph.tracing import trace
from compressor.surgery.cutting import cut
from compressor.training.models import ModelSpec, build


class Small(nn.Module):
    """Tied weights, a buffer that a state_dict leaves out, a depthwise and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.again = nn.Conv2d(8, 8, 1, groups=2)
        self.again.weight = self.grouped.weight
        self.head = nn.Linear(8, 5)
        self.scale = 1.0
        self.register_buffer("shift", torch.randn(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.first(x)).relu()) + self.shift
        return self.scale * self.head(self.again(self.grouped(x).relu()).mean((2, 3)))


def shaken(model: nn.Module) -> nn.Module:
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def pruned(model: nn.Module, inputs: Tensor) -> nn.Module:
    graph = trace(model, inputs)
    cut(graph, random_keep(graph))
    return model


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


def changed(path: Path, metadata: dict[str, str] | None = None, **content: Any) -> Path:
    """Forge a file: other metadata, other content, and a checksum that fits."""
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    text = json.dumps(json.loads(old["content"]) | content)
    new = old | {"content": text, "sha256": checksum(text, tensors)} | (metadata or {})
    safetensors.torch.save_file(tensors, path, new)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save(shaken(Small()), path)
    return path


# -- what comes back


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "regnet_y_400mf"])
def test_a_pruned_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    inputs = torch.randn(2, 3, 32, 32)
    model = pruned(shaken(build(name, classes=7)), inputs)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert torch.equal(outputs(model, inputs), outputs(loaded, inputs))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in build(name, classes=7).parameters())
    assert loaded.compressor_spec == ModelSpec(name, 7)


@pytest.mark.parametrize(
    "made",
    [
        lambda model: model,
        lambda model: model.double(),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.bfloat16(),
    ],
    ids=["float32", "float64", "channels_last", "bfloat16"],
)
def test_a_model_of_the_users_own_comes_back_bit_for_bit(made: Callable[[Small], Small], tmp_path: Path) -> None:
    model = made(pruned(shaken(Small()), torch.randn(2, 3, 8, 8)))  # type: ignore[arg-type]
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", factory=Small)
    inputs = torch.randn(2, 3, 8, 8, dtype=model.head.weight.dtype)
    assert torch.equal(outputs(model, inputs), outputs(loaded, inputs))
    assert loaded.again.weight is loaded.grouped.weight
    assert loaded.depthwise.groups == model.depthwise.groups < 8
    assert [t.stride() for t in loaded.parameters()] == [t.stride() for t in model.parameters()]
    assert [t.dtype for t in loaded.buffers()] == [t.dtype for t in model.buffers()]


def test_numbers_among_the_attributes_come_back(tmp_path: Path) -> None:
    model = shaken(Small())
    model.norm.eps, model.scale, model.first.dilation, model.first.padding = 0.5, 3.0, (2, 2), (2, 2)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", factory=Small)
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(outputs(model, inputs), outputs(loaded, inputs))
    assert not torch.equal(outputs(loaded, inputs), outputs(shaken(Small()), inputs))


def test_a_loaded_model_can_be_pruned_saved_and_loaded_again(tmp_path: Path) -> None:
    inputs, path = torch.randn(2, 3, 16, 16), tmp_path / "m.safetensors"
    save(pruned(build("resnet18", classes=3, stem="cifar"), inputs), path)
    twice = pruned(load(path), inputs)
    save(twice, path)
    assert torch.equal(outputs(twice, inputs), outputs(load(path), inputs))


def test_saving_and_loading_leave_everything_else_as_it_was(tmp_path: Path) -> None:
    model = build("resnet18", classes=3, stem="cifar").train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", factory=lambda: build("resnet18", classes=3, stem="cifar"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in loaded.modules())


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    path, model = tmp_path / "m.safetensors", build("resnet18", classes=3, stem="cifar")
    cut(trace(model, torch.randn(1, 3, 16, 16)), {"layer1.0.conv1": range(5)})
    save(model, path, extra={"accuracy": 0.5, "input": [3, 16, 16]})
    said = describe(path)
    assert said.spec == {"factory": "resnet18", "classes": 3, "stem": "cifar", "in_channels": 3}
    assert said.cut == {
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer1.0.bn1.weight": (64,),
        "layer1.0.bn1.bias": (64,),
        "layer1.0.bn1.running_mean": (64,),
        "layer1.0.bn1.running_var": (64,),
        "layer1.0.conv2.weight": (64, 64, 3, 3),
    }
    assert said.shapes["layer1.0.conv2.weight"] == (64, 5, 3, 3)
    assert said.extra == {"accuracy": 0.5, "input": [3, 16, 16]}
    assert said.versions.keys() == {"compressor", "torch", "torchvision"}
    assert said.size_bytes == path.stat().st_size


# -- what is refused


def test_a_file_names_no_code_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\ndef make(num_classes): return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "m.safetensors"
    for factory in ("os:system", "evil_module:make", "evil_module.make", "os.system", "../evil_module"):
        save(build("resnet18", classes=3), path)
        changed(path, spec={"factory": factory, "classes": 3})
        with pytest.raises(ArtifactError, match=r"load\(path, factory=\.\.\.\)"):
            load(path)
    assert not marker.exists()
    assert "evil_module" not in sys.modules


def test_a_file_sets_no_attribute_that_is_not_a_number(small: Path) -> None:
    for attributes in ({"": {"forward": 1}}, {"head": {"weight": 1}}, {"nobody": {"scale": 1}}):
        changed(small, attributes=attributes)
        with pytest.raises(ArtifactError, match="holds another model than Small"):
            load(small, factory=Small)


def test_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "plain").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, tmp_path / "torch")
    for name in ("plain", "torch"):
        with pytest.raises(ArtifactError, match="no safetensors file"):
            load(tmp_path / name, factory=Small)
    assert not (tmp_path / "ran").exists()


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"m\.safetensors"):
            describe(path)


def test_a_file_cut_short_is_noticed(small: Path) -> None:
    whole = small.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        small.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="is damaged, or no safetensors file"):
            load(small, factory=Small)


def test_what_cannot_be_loaded_says_why(small: Path, tmp_path: Path) -> None:
    def refused(message: str, path: Path = small, factory: Callable[[], Any] | None = Small) -> None:
        with pytest.raises(ArtifactError, match=message) as caught:
            load(path, factory=factory)
        assert "\n" not in str(caught.value)

    refused(r"nowhere\.safetensors is missing: give a file that compressor saved", tmp_path / "nowhere.safetensors")
    refused("is a folder: give a file that compressor saved", tmp_path)
    refused(r"does not say how to build its model: load\(path, factory=\.\.\.\)", factory=None)
    refused("holds another model than Linear: .*is only in one of the two", factory=lambda: nn.Linear(2, 2))
    with pytest.raises(InputError, match="factory gave a str: give a callable that gives the dense model"):
        load(small, factory=lambda: "x")  # type: ignore[arg-type, return-value]
    refused("this compressor reads 1: update compressor", changed(small, {"version": "2"}))
    refused("was not written by compressor", changed(small, {"format": "pt"}))
    safetensors.torch.save_file({"weight": torch.ones(2)}, small)
    refused("was not written by compressor")


@pytest.mark.parametrize("spec", [{"factory": "resnet81", "classes": 3}, {"classes": 3}, {"factory": 3}])
def test_a_spec_that_means_nothing_is_refused(spec: Any, small: Path) -> None:
    with pytest.raises(ArtifactError, match=r"names no model that can be built|holds no such tensor"):
        load(changed(small, spec=spec))


def test_a_file_that_names_more_than_it_holds_takes_no_memory(small: Path) -> None:
    spec = {"factory": "resnet18", "classes": 900_000, "stem": "imagenet", "in_channels": 3}
    with pytest.raises(ArtifactError, match=r"names resnet18 with 900,000 classes, and holds no such tensor"):
        load(changed(small, spec=spec))
    with pytest.raises(ArtifactError, match=r"names a model of [\d,]+ numbers, and holds [\d,]+ of them"):
        load(changed(small, spec=spec, cut={"fc.weight": [900_000, 3_000]}))


DEEP = json.loads("[" * 90 + "]" * 90)


@pytest.mark.parametrize(
    "content",
    [
        {"cut": 5},
        {"cut": {"a": [-3]}},
        {"cut": {"a": [0.5]}},
        {"cut": {"a": [2**70]}},
        {"attributes": []},
        {"attributes": {"": 3}},
        {"attributes": {"": {"scale": "x"}}},
        {"channels_last": 1},
        {"channels_last": [1]},
        {"spec": []},
        {"spec": 5},
        {"versions": {"torch": 2}},
        {"extra": DEEP},
    ],
)
def test_content_of_another_kind_is_refused(content: dict[str, Any], small: Path) -> None:
    with pytest.raises(ArtifactError, match="no model file as compressor writes them"):
        load(changed(small, **content), factory=Small)


@pytest.mark.parametrize("name", ["first.bias", "extra.weight"])
def test_a_missing_and_an_additional_tensor_are_named(name: str, small: Path) -> None:
    tensors = safetensors.torch.load_file(small)
    if tensors.pop(name, None) is None:
        tensors[name] = torch.ones(3)
    text = json.dumps({"spec": None, "cut": {}, "attributes": {}, "channels_last": [], "extra": {}, "versions": {}})
    metadata = {"format": FORMAT, "version": "1", "content": text, "sha256": checksum(text, tensors)}
    safetensors.torch.save_file(tensors, small, metadata)
    with pytest.raises(ArtifactError, match=f"'{name}' is only in one of the two"):
        load(small, factory=Small)


# -- what cannot be saved


def test_a_failed_save_leaves_the_old_file_and_nothing_else(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small.read_bytes()

    real = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        real(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(InputError, match=r"cannot write .*small\.safetensors: No space left on device"):
        save(Small(), small)
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_what_cannot_be_saved_says_why(tmp_path: Path) -> None:
    path, other = tmp_path / "m.safetensors", build("resnet18", classes=3)
    with pytest.raises(InputError, match=r"there is no folder .*nowhere; create it first"):
        save(Small(), tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(InputError, match="it is a folder; give the name of a file"):
        save(Small(), tmp_path)
    with pytest.raises(InputError, match=r"extra cannot be kept: .*; give numbers, strings, lists and dicts of them"):
        save(Small(), path, extra={"tensor": torch.ones(2)})
    other.fc = nn.Identity()
    with pytest.raises(InputError, match=r"not 'resnet18' any more: 'fc.bias' is only in what ModelSpec"):
        save(other, path)
    with pytest.raises(InputError, match=r"not 'resnet18' any more: .* is only in the model"):
        save(Small(), path, spec=ModelSpec("resnet18", 3))
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

    with pytest.raises(InputError, match=r"module '0' \(Odd\) has state that is no tensor"):
        save(nn.Sequential(Odd(2, 2)), tmp_path / "m.safetensors")


def test_the_file_can_be_read_by_whom_the_users_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    save(nn.Linear(2, 2), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_tensor_of_whole_numbers_for_weights_is_refused(tmp_path: Path) -> None:
    model = Small()
    model.head.weight = nn.Parameter(torch.ones(model.head.weight.shape, dtype=torch.int64), requires_grad=False)
    save(model, tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match=r"tensor 'head\.weight' is int64 there, and float32 in the model"):
        load(tmp_path / "m.safetensors", factory=Small)


def test_a_compiled_model_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    save(torch.compile(model, backend="eager"), tmp_path / "a.safetensors")
    made = load(tmp_path / "a.safetensors", factory=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)))
    assert all(torch.equal(one, other) for one, other in zip(made.parameters(), model.parameters(), strict=True))
