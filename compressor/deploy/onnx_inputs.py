"""What an ONNX file wants to be fed: inputs made up for timing it, whoever wrote the file.

    images: tensor(float)  ["batch", 3, "height", "width"]      ->  (8, 3, 224, 224), with image_size=224
    ids:    tensor(int64)  ["batch", 128]                       ->  (8, 128), ones
    scale:  tensor(float)  []                                   ->  one number

The first dimension is the batch where it has no fixed number. Height and width are the two that have none behind it.
Any other size without a number is the model's own affair, and is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(bool)": torch.bool,
    **{
        f"tensor({sign}int{bits})": getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)
    },
}

Dim = int | str | None  # of an ONNX file: a number, a name, or nothing


def example_inputs(
    session: Any,
    batch_size: int,
    image_size: int | None = None,
    *,
    name: str = "the file",
    check: Callable[[Sequence[int]], None] | None = None,
) -> dict[str, Tensor]:
    """Return inputs of the sizes and types that an open session declares, by name.

    Args:
        session: an `onnxruntime.InferenceSession`.
        batch_size: examples at once.
        image_size: height and width, where the file leaves them open.
        name: what messages call the file.
        check: is shown the shape of each input before it is made, and may raise: one may be larger than the memory.

    Returns:
        A dict of tensors: noise, pixels from 0 to 255 for uint8, and ones where numbers may be indices or masks.

    Raises:
        InputError: a batch or an image size that the file does not take, or an input that cannot be made up.
    """
    slots = session.get_inputs()
    if not slots:
        raise InputError(f"{name} has no inputs: there is nothing to time")
    batches = {slot.shape[0] for slot in slots if slot.shape}
    for slot in slots:
        if slot.type not in _DTYPES:
            raise InputError(
                f"input {slot.name!r} of {name} is {slot.type}: only inputs of floats, integers and booleans can be"
                " made up"
            )
    sizes = {slot.name: _sizes(slot.name, slot.shape, batch_size, image_size, batches, name) for slot in slots}
    if check:
        for shape in sizes.values():
            check(shape)
    return {slot.name: _filled(sizes[slot.name], _DTYPES[slot.type]) for slot in slots}


def _sizes(
    slot: str, shape: Sequence[Dim], batch_size: int, image_size: int | None, batches: set[Dim], name: str
) -> list[int]:
    """Return a number for every dimension of one input."""
    if not shape:
        return []
    asked = f"input {slot!r} of {name} is {_written(shape)}"
    if isinstance(shape[0], int) and len(shape) > 1 and shape[0] != batch_size:
        raise InputError(
            f"{asked}, with a fixed batch: give --batch-size {shape[0]}, or export it with a dynamic batch"
        )
    sides = _sides(shape)
    if image_size and sides and any(isinstance(shape[dim], int) and shape[dim] != image_size for dim in sides):
        raise InputError(f"{asked}, with a fixed image size: leave --image-size out")
    chosen = dict.fromkeys(sides, image_size) | ({} if isinstance(shape[0], int) else {0: batch_size})
    sizes = [size if isinstance(size, int) else chosen.get(dim) for dim, size in enumerate(shape)]
    # One name means one number: what is called as the batch is elsewhere, is as long as it.
    sizes = [batch_size if size is None and shape[dim] in batches - {None} else size for dim, size in enumerate(sizes)]
    for dim, size in enumerate(sizes):
        if size is None and dim in sides:
            raise InputError(f"{asked}, and its height and width may be any: give --image-size")
        if size is None:
            raise InputError(
                f"{asked}, and nothing says how long dimension {dim} is: write its number into the file, with "
                f"python -m onnxruntime.tools.make_dynamic_shape_fixed --dim_param {shape[dim]} --dim_value N IN OUT"
            )
    return [int(size) for size in sizes if size is not None]


def _sides(shape: Sequence[Dim]) -> tuple[int, ...]:
    """Return which dimensions are height and width: the last two of images, or those before the channels."""
    if len(shape) != 4:
        return ()
    channels_last = isinstance(shape[3], int) and shape[3] <= 4 and not isinstance(shape[1], int)
    return (1, 2) if channels_last else (2, 3)


def _written(shape: Sequence[Dim]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"


def _filled(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    # A generator of its own leaves the caller's random state alone.
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.uint8:
        return torch.randint(256, tuple(sizes), generator=generator, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.ones(sizes, dtype=dtype)  # 1 is a legal index of whatever has two entries, and a mask that is open
