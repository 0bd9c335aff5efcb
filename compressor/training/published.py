"""Weights that were published with a model, by the library that has the model: torchvision's and timm's.

Both download a file once and keep it in their own cache; what is downloaded is checked by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compressor.errors import InputError
from compressor.training.models import TIMM, names_code
from compressor.training.user_code import first_line

_OF_A_BYTE = 255  # ours is of pixels in 0 to 255, theirs of pixels in 0 to 1


@dataclass(frozen=True)
class Published:
    """Weights by name, and the mean and standard deviation of pixels (0 to 255) that they were trained with."""

    tensors: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def published_weights(name: str) -> Published:
    """Return the published weights of a model, the best that its library has.

    Args:
        name: a torchvision classifier, or `timm:NAME`.

    Raises:
        InputError: nobody has published any, or they cannot be downloaded.
    """
    if names_code(name):
        raise InputError(
            f"--weights default: weights are published for models of torchvision and timm, and {name} is neither; let "
            "the factory load its own, or give a file"
        )
    fetch = _from_timm if name.startswith(TIMM) else _from_torchvision
    try:
        tensors, mean, std = fetch(name.removeprefix(TIMM))
    except Exception as error:  # no network, no space, a hash that does not match: each library has its own
        raise InputError(
            f"cannot get the published weights of {name} ({first_line(error)}): try again with a network, or give a "
            "file, --weights FILE"
        ) from error
    return Published(tensors, *(tuple(_OF_A_BYTE * each for each in values) for values in (mean, std)))


def _from_torchvision(name: str) -> tuple[dict[str, Tensor], Any, Any]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    how = weights.transforms()
    return dict(weights.get_state_dict(progress=False, check_hash=True)), how.mean, how.std


def _from_timm(name: str) -> tuple[dict[str, Tensor], Any, Any]:
    import timm

    model = timm.create_model(name, pretrained=True)
    return dict(model.state_dict()), model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
