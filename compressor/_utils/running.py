"""Running a model and leaving it as it was: what every room that runs one shares.

`example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments, as for `model(...)`. The first
dimension of every tensor in it is the batch.
"""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from compressor.errors import CompressorError, InputError


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Put Python's search for cyclic garbage off: with many new objects it takes longer than what they are for."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def ambient_modes_disabled() -> Iterator[None]:
    """Work outside of the caller's `torch.inference_mode` and autocast.

    What is made inside the first can never be trained, and the second makes a model run other operations.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _modes_preserved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put every module's flag of training back afterwards."""
    training = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, flag in training:
            vars(module)["training"] = flag  # what `module.training = flag` does, less torch's search for parameters


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's flag and all random states are as before.

    That is torch's, numpy's and Python's own: a model may draw from any of them.
    """
    modules = list(model.modules())  # once: of a deep model the list takes as long as ten of its operations
    tensors = [tensor for module in modules for tensor in module._parameters.values() if tensor is not None]
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
    drawn = random.getstate(), np.random.get_state()
    try:
        with _modes_preserved(modules), torch.random.fork_rng(devices), ambient_modes_disabled(), torch.no_grad():
            if any(module.training for module in modules):
                model.eval()
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return in which order a tensor's dimensions lie in memory, as torch names it.

    By the strides: of a 1x1 kernel torch says that it is laid out both ways, but it computes by the strides.
    """
    dims = range(tensor.dim())
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(dims))
    if last is None or tensor.stride() == _dense_strides(tensor.shape, dims):
        return torch.contiguous_format
    is_last = tensor.stride() == _dense_strides(tensor.shape, (0, *dims[2:], 1))
    return last if is_last else torch.contiguous_format


def _dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor whose dimensions lie in this order, the slowest first."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the model itself where `torch.compile` wrapped it; both share all parameters."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


@contextmanager
def tf32_disabled() -> Iterator[None]:
    """Let a GPU multiply float32 in full; with ten bits of each factor no outputs agree to a few digits."""
    # Not by `allow_tf32`, which cannot be read any more once somebody has set these.
    cudnn: Any = torch.backends.cudnn
    places = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first tensor; the CPU for a model without any."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


# -- inputs and outputs


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of `model(...)`."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


@dataclass(frozen=True)
class OwnForward:
    """A batch of any kind, and how its owner runs a model on it. Stands where the inputs of a model do.

    Attributes:
        forward: takes the model and the batch.
        batch: what only `forward` understands.
    """

    forward: Callable[[nn.Module, Any], Any]
    batch: Any

    def run(self, model: nn.Module) -> Any:
        """Return what `forward` does; modes and buffers of the model are then as they were.

        A detector tells its losses in training mode alone, in which BatchNorm would move.
        """
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with _modes_preserved(model.modules()):
                return self.forward(model, self.batch)
        finally:
            for buffer, before in buffers:
                buffer.data.copy_(before)  # past autograd, which is yet to come


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Return what a model makes of its inputs: a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, OwnForward):
        return inputs.run(model)
    arguments, named = as_arguments(inputs)
    return model(*arguments, **named)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Return what a model makes of a batch of real inputs, wherever that lies.

    Raises:
        InputError: the model does not run on it.
    """
    try:
        return run_model(model, to_device(batch, device_of(model)))
    except (CompressorError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        if isinstance(batch, OwnForward):  # the caller's own code failed, and its own words are the best there are
            raise
        kinds = tree_map(lambda x: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else x, batch)
        raise InputError(
            f"{type(model).__name__} does not run on a batch of calibration ({kinds}): {type(failure).__name__}: "
            f"{failure}; give batches of the same kind as example_inputs"
        ) from failure


def count_samples(inputs: Any) -> int:
    """Return the length of the first tensor that has dimensions: the samples of a batch, in whatever it is nested.

    A list of images `(C, H, W)`, as torchvision's detectors take them, is a batch of its length.

    Raises:
        InputError: there is none.
    """
    if isinstance(inputs, OwnForward):
        return count_samples(inputs.batch)
    first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    if isinstance(first, list) and first and all(isinstance(image, Tensor) and image.dim() == 3 for image in first):
        return len(first)
    for _, tensor in named_tensors(inputs):
        if tensor.dim():
            return len(tensor)
    raise InputError(
        f"inputs are {type(inputs).__name__} without a tensor: give one whose first dimension is the batch"
    )


def named_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors in nested inputs or outputs, each with its place (`logits`, `0`; nothing for a lone tensor).

    The order is torch's own, which is also that of an exported file.
    """
    leaves: list[tuple[Any, Any]]
    try:
        leaves = tree_flatten_with_path(value)[0]
    except ValueError:  # a container that torch knows without its keys, as diffusers registers its outputs
        leaves = [((number,), leaf) for number, leaf in enumerate(tree_leaves(value))]
    return [(_place(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _place(path: Any) -> str:
    return re.sub(r"\W+", "_", "".join(map(str, path))).strip("_")


def to_device(inputs: Any, device: torch.device) -> Any:
    """Return a copy of the inputs on a device; what is no tensor (a flag, None) stays as it is.

    A copy, because a model may write into its inputs (`x *= 255`), and they are the caller's.
    """
    if isinstance(inputs, OwnForward):
        return OwnForward(inputs.forward, to_device(inputs.batch, device))
    return tree_map(lambda value: value.to(device, copy=True) if isinstance(value, Tensor) else value, inputs)


def batch_size(inputs: Any, what: str = "example_inputs") -> int:
    """Return the batch size that all tensors share.

    Raises:
        InputError: something that is no tensor or has no batch dimension, or different batch sizes.
    """
    for path, leaf in tree_flatten_with_path(inputs)[0]:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            kind = "a tensor without dimensions" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            raise InputError(f"{what} hold {kind}{_at(path)}: give tensors whose first dimension is the batch")
    sizes = [len(tensor) for _, tensor in named_tensors(inputs)]
    if len(set(sizes)) != 1 or sizes[0] == 0:
        raise InputError(f"{what} have the batch sizes {sizes}: give at least one example, and as many in every tensor")
    return sizes[0]


def _at(path: Any) -> str:
    return f" at {_place(path)!r}" if path else ""
