"""Models by name or by import path, and weights from a file.

A name is either one of torchvision's classifiers (`resnet18`, `vgg16`, ...) or `package.module:factory` for a model of
the user's own. What was built is written on the model as `model.compressor_spec`, so that it can be built again.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import ArtifactError, InputError, RangeError, UnknownNameError

STEMS = ("imagenet", "cifar")

# What a factory needs beside the number of classes. Auxiliary classifiers exist for training from the 2014 recipe only;
# init_weights is named because torchvision warns about its own default.
_ARGUMENTS: Mapping[str, Mapping[str, object]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@dataclass(frozen=True)
class ModelSpec:
    """How to build a dense model; `dataclasses.asdict` gives it as JSON values, `ModelSpec(**values)` takes them back.

    Attributes:
        factory: a torchvision classifier's name, or `package.module:factory`.
        classes: number of outputs.
        stem: "imagenet", or "cifar" for images of about 32x32.
        in_channels: channels of the images.

    Raises:
        InputError: a field that means nothing; also for values that came from a file.
    """

    factory: str
    classes: int
    stem: str = "imagenet"
    in_channels: int = 3

    def __post_init__(self) -> None:
        """Refuse fields that mean nothing."""
        if not isinstance(self.factory, str):
            raise InputError(f"factory = {self.factory!r} is no name: give the name of a model")
        for name, value in (("classes", self.classes), ("in_channels", self.in_channels)):
            if type(value) is not int or value < 1:
                raise RangeError(name, value, "1, 2, 3, ...")
        if self.stem not in STEMS:
            raise UnknownNameError("stem", str(self.stem), STEMS)

    @property
    def names_code(self) -> bool:
        """Whether building imports a module of the user's: never do that for a spec that was read from a file."""
        return ":" in self.factory

    def build(self, *, seed: int | None = None) -> nn.Module:
        """Build the dense model with fresh weights; see `build`."""
        make = _from_import_path if self.names_code else _from_torchvision
        with _seeded(seed):
            model = make(self)
        vars(model)["compressor_spec"] = self  # beside the modules: it must not appear in the state_dict
        return model


def build(
    name: str, *, classes: int, stem: str = "imagenet", in_channels: int = 3, seed: int | None = None
) -> nn.Module:
    """Build a model with fresh weights, `(B, in_channels, H, W)` to `(B, classes)`; `model.compressor_spec` tells how.

    Args:
        name: a torchvision classifier, or `package.module:factory`, which is called as `factory(num_classes=classes)`
            if it takes that argument and as `factory()` otherwise.
        classes: number of outputs.
        stem: "cifar" gives ResNets a 3x3 stride-1 first convolution without max-pool, VGGs a single classifier layer.
        in_channels: channels of the images; torchvision models only.
        seed: makes the weights repeatable and leaves torch's global generator as it was; None draws from the latter.

    Raises:
        UnknownNameError: no such model; says what is close.
        InputError: the stem or the channels do not go with the model, or the user's factory does not work.
    """
    return ModelSpec(name, classes, stem, in_channels).build(seed=seed)


def names() -> list[str]:
    """Give the names of torchvision's classifiers."""
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def load_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of a file into the model; all of them, or none where anything does not fit.

    Args:
        model: takes the values, on its own device and in its own precision.
        path: `.safetensors`, or a `.pt` or `.pth` file of `torch.save(model.state_dict(), path)`. Nothing is unpickled.

    Raises:
        InputError: a file of another kind.
        ArtifactError: the file is missing, damaged, holds more than tensors, or belongs to another model: the first
            tensor that does not fit is named with both shapes, and how many do fit.
    """
    given, wanted = _read_tensors(path), model.state_dict()
    # BatchNorm's batch counter is younger than many published weights, and has no effect on what the model gives.
    expected = {name for name in wanted if name in given or not name.endswith(".num_batches_tracked")}
    wrong = [name for name in wanted if name in expected and _shape(given, name) != _shape(wanted, name)]
    wrong += [name for name in given if name not in wanted]
    if wrong:
        fitting = sum(_shape(given, name) == _shape(wanted, name) for name in expected)
        raise ArtifactError(_misfit(path, wrong[0], given, wanted, fitting))
    with torch.no_grad():
        for name in expected:
            wanted[name].copy_(given[name])


def _misfit(path: Path, name: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], fitting: int) -> str:
    there, here = (_shape(tensors, name) if name in tensors else "absent" for tensors in (given, wanted))
    return (
        f"{path} belongs to another model: tensor {name!r} is {there} in the file and {here} in the model; "
        f"{fitting} of the model's {len(wanted)} tensors fit. Give weights of the same model, stem and classes"
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    readers: dict[str, Callable[[Path], object]] = {".safetensors": load_file, ".pt": _torch_load, ".pth": _torch_load}
    if path.suffix not in readers:
        raise InputError(f"{path} is no weights file: give one that ends in {', '.join(readers)}")
    if not path.is_file():
        raise ArtifactError(f"there is no weights file {path}")
    try:
        tensors = readers[path.suffix](path)
    except Exception as error:  # a damaged file makes the readers raise whatever their parser stumbles over
        raise ArtifactError(
            f"{path} cannot be read ({_first_line(error)}); give a file of tensors only, written by safetensors or by "
            "torch.save(model.state_dict(), path)"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ArtifactError(f"{path} holds other things than tensors by name: save model.state_dict() and give that")
    return dict(tensors)


def _torch_load(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Make torch's CPU generator draw from `seed`, and put it back afterwards."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


# -- torchvision's


def _from_torchvision(spec: ModelSpec) -> nn.Module:
    import torchvision

    if spec.factory not in (known := names()):
        raise UnknownNameError("model", spec.factory, known, "a model of your own is package.module:factory")
    arguments = _ARGUMENTS.get(spec.factory, {})
    model: nn.Module = torchvision.models.get_model(spec.factory, weights=None, num_classes=spec.classes, **arguments)
    if spec.stem == "cifar":
        _give_cifar_stem(model, spec)
    if spec.in_channels != 3:
        _give_channels(model, spec.in_channels)
    return model


def _give_cifar_stem(model: nn.Module, spec: ModelSpec) -> None:
    """Fit a model to images of about 32x32, as is usual in the literature on CIFAR-10."""
    from torchvision.models import VGG, ResNet

    if isinstance(model, ResNet):
        model.conv1 = _like_torchvision(nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False))
        model.maxpool = nn.Identity()
    elif isinstance(model, VGG):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, spec.classes)
    else:
        raise InputError(
            f"{spec.factory} has no cifar stem: ResNets, ResNeXts, Wide ResNets and VGGs have; use --stem imagenet"
        )


def _give_channels(model: nn.Module, in_channels: int) -> None:
    """Exchange the first convolution for one that takes `in_channels`; everything else of it stays."""
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        kernel_size=old.kernel_size,  # type: ignore[arg-type]  # torch keeps tuples of any length
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    model.set_submodule(name, _like_torchvision(new))


def _like_torchvision(conv: nn.Conv2d) -> nn.Conv2d:
    """Give a convolution the fresh weights that torchvision's ResNets and VGGs begin with."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


# -- the user's own


def _from_import_path(spec: ModelSpec) -> nn.Module:
    if spec.stem != "imagenet" or spec.in_channels != 3:
        raise InputError(f"stem and in_channels have no effect on {spec.factory}: write them into the factory itself")
    factory = _imported(spec.factory)
    arguments = {"num_classes": spec.classes} if _takes_classes(factory) else {}
    try:
        model = factory(**arguments)
    except Exception as error:  # whatever the user's code raises is told in one line; the cause is kept
        called = f"{spec.factory}({', '.join(f'{name}={value}' for name, value in arguments.items())})"
        raise InputError(f"{called} failed: {_first_line(error)}; make it callable like this") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec.factory} gave a {type(model).__name__}: it must return a torch.nn.Module")
    return model


def _imported(path: str) -> Callable[..., object]:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{path!r} is no import path: give package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here
        advice = "is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else "it must import cleanly"
        raise InputError(f"cannot import {module_name!r} for {path}: {_first_line(error)}; {advice}") from error
    factory: Callable[..., object] | None = getattr(module, attribute, None)
    if not callable(factory):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UnknownNameError(f"factory in module {module_name}", attribute, public)
    return factory


def _takes_classes(factory: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some builtins do not tell
        return False
    return any(parameter.name == "num_classes" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
