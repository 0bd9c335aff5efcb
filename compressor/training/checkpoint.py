"""Checkpoints: everything a training run needs to go on as if it had never stopped, in one file without code.

    checkpoint/state.pt     written beside and renamed after every epoch; numbers, strings and tensors only

The file keeps the shape of every tensor: a model that was made smaller in mid-training is narrower in it than the dense
model that the caller builds again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor._utils import atomic_write
from compressor.errors import ArtifactError, InputError
from compressor.graph import restore_shapes, set_numeric_attributes

CHECKPOINT_FILE = "state.pt"
_FORMAT = "compressor training checkpoint 1"

Shapes = dict[str, tuple[int, ...]]


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint in place of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: a run that is killed while it writes resumes from the epoch before.
    with atomic_write(folder / CHECKPOINT_FILE) as unfinished:
        torch.save({"format": _FORMAT, **state}, unfinished)


def read(folder: Path) -> dict[str, Any] | None:
    """Read the checkpoint in a folder; None if there is none. Nothing is unpickled but numbers, strings and tensors.

    Raises:
        ArtifactError: the file is damaged, or is something else.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        # To the CPU, whatever it was written on: the machine that resumes may have no such GPU.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise whatever its parser stumbles over
        raise ArtifactError(
            f"checkpoint {path} is damaged ({type(error).__name__}): remove it to begin this training anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ArtifactError(f"{path} is no checkpoint of this version of compressor: give another folder")
    return state


def require_fit(state: Mapping[str, Any], folder: Path, about: Mapping[str, Any], dense: Shapes) -> None:
    """Refuse a checkpoint of another run.

    Args:
        state: the checkpoint.
        folder: where it is, for messages.
        about: settings by name that must be the same.
        dense: shapes of the model as it was before training.

    Raises:
        InputError: it was made with other settings.
        ArtifactError: it belongs to another model.
    """
    for name, value in about.items():
        if state["about"].get(name) != value:
            raise InputError(
                f"the checkpoint in {folder} was made with {name} = {state['about'].get(name)}, not {value}: "
                f"resume with the same {name}, or begin anew"
            )
    # The dense shapes, not those of the weights in the file: these are smaller wherever something was cut.
    for name in sorted(state["dense"].keys() | dense.keys()):
        there, here = (shapes.get(name, "absent") for shapes in (state["dense"], dense))
        if there != here:
            raise ArtifactError(
                f"the checkpoint in {folder} belongs to another model: {name!r} is {there} there and {here} here"
            )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, each once."""
    # Not `state_dict()`, which leaves out the buffers that a user registered with persistent=False.
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def shapes(model: nn.Module) -> Shapes:
    """Return the shape of every parameter and buffer."""
    return {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}


def restore_model(model: nn.Module, saved: Mapping[str, Tensor], numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the saved tensors into the model, however narrow; writes the model, its parameters stay the same objects.

    Args:
        model: the dense model.
        saved: every parameter and buffer by name.
        numbers: by module, its numbers among the attributes; code of the model may read sizes off them.
    """
    restore_shapes(model, {name: tuple(tensor.shape) for name, tensor in saved.items()})
    for name, module in model.named_modules():
        set_numeric_attributes(module, numbers.get(name, {}))
    for name, tensor in tensors(model).items():
        tensor.data = saved[name].to(tensor)  # not copied into place: the memory format is part of what must come back


def random_state(device: torch.device) -> dict[str, Any]:
    """Take the state of every global generator that training may draw from."""
    # numpy's keys as a list: the safe reader takes no numpy arrays.
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put every global generator back."""
    torch.set_rng_state(state["torch"])
    # A run that goes on with another kind of device draws anew there: bit-identical is promised on one device only.
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
