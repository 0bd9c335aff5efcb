"""Which models stand in the zoo, and what each is run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision import models

from compressor.training import models as by_name
from zoo.check import Case

TIMM_PIXELS = 320


def seeded(make: Callable[..., nn.Module], *args: Any, **settings: Any) -> nn.Module:
    """Build a model with the weights of seed 0, whatever was drawn before."""
    torch.manual_seed(0)
    return make(*args, **settings)


def image(*shape: int) -> Tensor:
    """Return a random batch of that shape, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# -- torchvision


def classifiers() -> list[Case]:
    """Give torchvision's classifiers, on the size of image that their weights were trained for."""
    return [_classifier(name) for name in by_name.names()]


def _classifier(name: str) -> Case:
    size = 299 if name == "inception_v3" else 224
    return Case(name, partial(seeded, by_name.build, name, classes=1000), partial(image, 1, 3, size, size))


def dense() -> list[Case]:
    """Give torchvision's detection, segmentation, video and optical flow models, on small inputs."""
    makers: Sequence[tuple[Any, Callable[[str], Case]]] = (
        (models.detection, _detector),
        (models.segmentation, _segmenter),
        (models.video, _video),
        (models.optical_flow, _flow),
    )
    return [make(name) for module, make in makers for name in models.list_models(module=module)]


def _torchvision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return partial(seeded, models.get_model, name, weights=None, **settings)


def _detector(name: str) -> Case:
    """Detectors are compared by their heads before anything is sorted, thresholded or suppressed."""
    if name.startswith("ssd"):
        build = _torchvision(name, weights_backbone=None)
        return Case(name, build, partial(_images, 320 if "lite" in name else 300), ("head",))
    build = _torchvision(name, weights_backbone=None, min_size=128, max_size=128)
    heads = ("rpn.head", "roi_heads.box_predictor") if "rcnn" in name else ("head",)
    return Case(name, build, partial(_images, 128), heads)


def _images(size: int) -> tuple[list[Tensor]]:
    return ([image(3, size, size)],)


def _segmenter(name: str) -> Case:
    build = _torchvision(name, weights_backbone=None, **({"aux_loss": True} if "lraspp" not in name else {}))
    return Case(name, build, partial(image, 1, 3, 96, 96))


def _video(name: str) -> Case:
    frames, size = (16, 224) if name.startswith("mvit") else (14, 224) if name == "s3d" else (8, 112)
    return Case(name, _torchvision(name), partial(image, 1, 3, frames, size, size))


def _flow(name: str) -> Case:
    """RAFT makes its grid of coordinates in single precision, whatever the precision of its images is."""
    build = _torchvision(name)
    return Case(name, build, lambda: (image(1, 3, 128, 128), image(1, 3, 128, 128)), dtype=torch.float32)


# -- timm


def timm_cases() -> list[Case]:
    """Give 150 models of all timm's families, those of `timm_names.txt`; `zoo/choose.py` made that file."""
    lines = (Path(__file__).parent / "timm_names.txt").read_text().splitlines()
    return [timm_case(line) for line in lines if not line.startswith("#")]


def timm_case(name: str) -> Case:
    """Return one of timm's models, on the image that it was made for; on a smaller one if it is large and free to vary.

    Those images are 224 pixels wide, 256 for the models that divide them by windows of that size.
    """
    build = partial(seeded, timm.create_model, name, pretrained=False)
    settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    size = settings.input_size[-1] if settings else 224
    if size > TIMM_PIXELS and settings and not settings.fixed_input_size:
        size = 256 if size % 256 == 0 else 224
    return Case(name, build, partial(image, 1, 3, size, size))
