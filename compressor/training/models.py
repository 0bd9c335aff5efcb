"""Models by name or by import path.

A name is either one of torchvision's classifiers (`resnet18`, `vgg16`, ...) or `package.module:factory` for a model of
the user's own. What was built is written on the model as `model.compressor_spec`, so that it can be built again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from compressor.errors import InputError, RangeError, UnknownNameError
from compressor.training.user_code import first_line, imported, present_folder_importable

logger = logging.getLogger(__name__)

STEMS = ("imagenet", "cifar")
TIMM = "timm:"  # what names of its models begin with
_MOST = 1_000_000  # classes and input channels: far more fill the memory before anything is refused

# What a factory needs beside the number of classes. Auxiliary classifiers exist for training from the 2014 recipe only;
# init_weights is named because torchvision warns about its own default.
_ARGUMENTS: Mapping[str, Mapping[str, object]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@dataclass(frozen=True)
class ModelSpec:
    """How to build a dense model; `dataclasses.asdict` makes JSON values of it, `ModelSpec(**values)` takes them back.

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
        # `type(...) is`, not isinstance: True would pass for one class.
        for name, value in (("classes", self.classes), ("in_channels", self.in_channels)):
            if type(value) is not int or not 1 <= value <= _MOST:
                raise RangeError(name, value, f"1 to {_MOST:,}")
        if self.stem not in STEMS:
            raise UnknownNameError("stem", str(self.stem), STEMS)

    @property
    def names_code(self) -> bool:
        """Whether building imports a module of the user's: never do that for a spec that was read from a file."""
        return names_code(self.factory)

    def build(self, *, seed: int | None = None) -> nn.Module:
        """Build the dense model with fresh weights; see `build`."""
        make = _from_import_path if self.names_code else _from_torchvision
        if self.factory.startswith(TIMM):
            make = _from_timm
        with _seeded(seed):
            model = make(self)
        vars(model)["compressor_spec"] = self  # beside the modules: it must not appear in the state_dict
        return model


def names_code(factory: str) -> bool:
    """Return whether a factory is a module of the user's, not a model of torchvision or timm."""
    return ":" in factory and not factory.startswith(TIMM)


def build(
    name: str, *, classes: int, stem: str = "imagenet", in_channels: int = 3, seed: int | None = None
) -> nn.Module:
    """Build a model with fresh weights, `(B, in_channels, H, W)` to `(B, classes)`; `model.compressor_spec` tells how.

    Args:
        name: a torchvision classifier, `timm:NAME`, or `package.module:factory`, which is called as
            `factory(num_classes=classes)` if it takes that argument and as `factory()` otherwise.
        classes: number of outputs.
        stem: "cifar": ResNets with a 3x3 stride-1 first convolution without max-pool, VGGs with one classifier layer.
        in_channels: channels of the images; models of torchvision and timm only.
        seed: makes the weights repeatable and leaves torch's global generator as it was; None draws from the latter.

    Raises:
        UnknownNameError: no such model; says what is close.
        InputError: the stem or the channels do not go with the model, or the user's factory does not work.
    """
    return ModelSpec(name, classes, stem, in_channels).build(seed=seed)


def names() -> list[str]:
    """Return the names of torchvision's classifiers."""
    import torchvision

    # Of this module alone: torchvision also lists detection, segmentation and video models.
    return list(torchvision.models.list_models(module=torchvision.models))


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Make torch's CPU generator draw from `seed`, and put it back afterwards."""
    # The CPU's generator alone: models are built there, and forking a GPU's would start CUDA for nothing.
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
        _set_cifar_stem(model, spec)
    if spec.in_channels != 3:
        _set_in_channels(model, spec.in_channels)
    return model


def _set_cifar_stem(model: nn.Module, spec: ModelSpec) -> None:
    """Fit a model to images of about 32x32, as is usual in the literature on CIFAR-10."""
    from torchvision.models import VGG, ResNet

    if isinstance(model, ResNet):
        model.conv1 = _initialized_like_torchvision(nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False))
        model.maxpool = nn.Identity()
    elif isinstance(model, VGG):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, spec.classes)
    else:
        raise InputError(
            f"{spec.factory} has no cifar stem: ResNets, ResNeXts, Wide ResNets and VGGs have; use --stem imagenet"
        )


def _set_in_channels(model: nn.Module, in_channels: int) -> None:
    """Exchange the first convolution for one that takes `in_channels`; everything else of it stays."""
    # A new one, not a sliced one: fresh weights must have the variance that fits their number of inputs.
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        kernel_size=old.kernel_size,  # type: ignore[arg-type]  # torch keeps tuples of any length
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    model.set_submodule(name, _initialized_like_torchvision(new))


def _initialized_like_torchvision(conv: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution, with the fresh weights that torchvision's ResNets and VGGs begin with."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


# -- timm's


def _from_timm(spec: ModelSpec) -> nn.Module:
    name = spec.factory.removeprefix(TIMM)
    try:
        import timm
    except ImportError as error:
        raise InputError(f"{spec.factory} needs timm: pip install timm") from error
    # NOTE: timm itself would take hf-hub:NAME and local-dir:PATH, and this name may come from a file. What follows a
    # dot says which of its weights: resnet18.a1_in1k.
    if name.partition(".")[0] not in (known := timm.list_models()):
        raise UnknownNameError("timm model", name, known, "a model of your own is package.module:factory")
    if spec.stem != "imagenet":
        raise InputError(f"{spec.factory} has no {spec.stem} stem: torchvision's ResNets and VGGs have")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=spec.classes, in_chans=spec.in_channels)
    return model


# -- the user's own


def _from_import_path(spec: ModelSpec) -> nn.Module:
    if spec.stem != "imagenet" or spec.in_channels != 3:
        raise InputError(f"stem and in_channels have no effect on {spec.factory}: write them into the factory itself")
    with present_folder_importable():
        return _from_factory(spec)


def _from_factory(spec: ModelSpec) -> nn.Module:
    factory = imported(spec.factory, "factory")
    arguments = {"num_classes": spec.classes} if _takes_classes(factory) else {}
    if not arguments:
        logger.info("%s takes no num_classes: called without arguments", spec.factory)
    try:
        model = factory(**arguments)
    except Exception as error:  # whatever the user's code raises is told in one line; the cause is kept
        called = f"{spec.factory}({', '.join(f'{name}={value}' for name, value in arguments.items())})"
        raise InputError(f"{called} failed: {first_line(error)}; make it callable like this") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec.factory} gave a {type(model).__name__}: it must return a torch.nn.Module")
    _require_trainable(spec.factory, model)
    return model


def _require_trainable(factory: str, model: nn.Module) -> None:
    """Refuse modules that look like a model, and cannot be trained or cut as one."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{factory} gave a scripted module, whose code cannot change: return the module itself")
    if isinstance(model, torch.fx.GraphModule) and hasattr(model, "graph_signature"):
        raise InputError(f"{factory} gave an exported program, whose sizes are fixed: return the module itself")
    lazy = [name for name, each in model.named_parameters() if isinstance(each, nn.parameter.UninitializedParameter)]
    if lazy:
        raise InputError(
            f"{factory} gave a model whose {lazy[0]!r} has no shape yet: run it once in the factory, model(torch.zeros("
            "1, 3, H, W)), before you return it"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{factory} gave a model without data (on meta tensors): build it on the CPU")


def _takes_classes(factory: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some builtins do not tell
        return False
    return any(parameter.name == "num_classes" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
