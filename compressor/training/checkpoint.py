"""Checkpoints: everything a training run needs to go on as if it had never stopped, in one file without code.

    checkpoint/state.pt       written beside and renamed after every epoch; numbers, strings and tensors only
    checkpoint/previous.pt    the one before, for a run whose newest is damaged

    a line with the format's name and version, a line with the SHA-256 of the rest, what torch.save writes

The file keeps the shape of every tensor: a model that was made smaller in mid-training is narrower in it than the dense
model that the caller builds again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor._utils import Ranks, atomic_write
from compressor.errors import ArtifactError, CompressorError, InputError
from compressor.graph import (
    all_numeric_attributes,
    is_numeric,
    numeric_attributes,
    restore_shapes,
    set_numeric_attributes,
)

NEWEST, PREVIOUS = "state.pt", "previous.pt"
_HEADER = b"compressor training checkpoint 3\n"

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one before stays beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = folder / NEWEST
    # Written by Python, not by torch's own writer: a full disk is an OSError then, as everywhere.
    payload = io.BytesIO()
    torch.save(dict(state), payload)
    content = payload.getbuffer()
    digest = hashlib.sha256(content).hexdigest().encode()
    # Renamed when complete: a run that is killed while it writes resumes from the checkpoint before.
    with atomic_write(newest) as unfinished:
        with unfinished.open("wb") as file:
            file.writelines((_HEADER, digest, b"\n", content))
        if newest.exists():
            newest.replace(folder / PREVIOUS)


def read(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint in a folder, or the one before where that is damaged; None if there is none.

    Nothing is unpickled but numbers, strings and tensors.

    Raises:
        ArtifactError: both are damaged, or are something else.
    """
    there = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()]
    failures = list[ArtifactError]()
    for path in there:
        try:
            state = _read(path)
        except ArtifactError as failure:
            failures.append(failure)
            continue
        for damage in failures:
            logger.warning("%s; going on from the checkpoint before it", damage)
        return state
    if failures:
        raise failures[0]
    return None


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    if not content.startswith(_HEADER):
        raise ArtifactError(f"{path} is no checkpoint of this version of compressor: give another folder")
    digest, _, payload = content[len(_HEADER) :].partition(b"\n")
    advice = "remove it to begin this training anew"
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise ArtifactError(f"checkpoint {path} is damaged: its content does not match its checksum; {advice}")
    try:
        # To the CPU, whatever it was written on: the machine that resumes may have no such GPU.
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a checksum is no signature: the reader raises whatever its parser stumbles over
        raise ArtifactError(f"checkpoint {path} is damaged ({type(error).__name__}); {advice}") from error
    if not isinstance(state, dict):
        raise ArtifactError(f"checkpoint {path} is damaged (no table of a run's state); {advice}")
    return state


@contextmanager
def as_damage(folder: Path) -> Iterator[None]:
    """Say that the checkpoint is damaged, whatever fails inside: a checksum is no signature, fields may be anything."""
    try:
        yield
    except CompressorError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise ArtifactError(
            f"the checkpoint in {folder} is damaged ({kind}: {error}); remove it to begin this training anew"
        ) from error


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
    modules = dict(model.named_modules())
    for name, values in numbers.items():
        # Only numbers where the model has some: a file must not put `forward` on a module.
        if not values.keys() <= numeric_attributes(modules[name]).keys() or not all(map(is_numeric, values.values())):
            raise InputError(f"the numbers that are kept for {name or 'the model'!r} are not those of this model")
    restore_shapes(model, {name: tuple(tensor.shape) for name, tensor in saved.items()})
    for name, module in model.named_modules():
        set_numeric_attributes(module, numbers.get(name, {}))
    for name, tensor in tensors(model).items():
        tensor.data = saved[name].to(tensor)  # not copied into place: the memory format is part of what must come back


def write_model(folder: Path, model: nn.Module, about: Mapping[str, Any]) -> None:
    """Keep a model as it is between two trainings, and what is to be known of it: numbers, strings and tensors."""
    kept = {name: tensor.detach() for name, tensor in tensors(model).items()}
    write(folder, {"tensors": kept, "numbers": all_numeric_attributes(model), "about": dict(about)})


def read_model(folder: Path, model: nn.Module) -> dict[str, Any] | None:
    """Put what `write_model` kept into the model as it was before it was cut; writes the model.

    Returns:
        What was to be known of it; None where nothing was kept, and the model is as it was.

    Raises:
        ArtifactError: what was kept is damaged, or is something else.
    """
    state = read(folder)
    if state is None:
        return None
    with as_damage(folder):
        restore_model(model, state["tensors"], state["numbers"])
        return dict(state["about"])


def take_over(model: nn.Module, ranks: Ranks) -> None:
    """Give the model on every rank the weights that it has on the first, and their shapes; writes the model."""
    if ranks.size == 1:
        return
    own = None
    if ranks.is_first:
        own = {name: tensor.detach().cpu() for name, tensor in tensors(model).items()}, all_numeric_attributes(model)
    taken = ranks.object_of_the_first(own)
    if taken and not ranks.is_first:
        restore_model(model, *taken)


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
