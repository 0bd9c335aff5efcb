"""Whose rows they are, in a layer whose dimension 0 holds more than the batch: windows, patches, boxes of all images.

Three samples run through the model twice, once the first and once the second all NaN. Where NaN comes up again says
which rows are a sample's:

    first in rows 0, 1, second in 2, 3 of 6     the rows of a sample lie together: "interleaved"
    first in rows 0, 3, second in 1, 4 of 6     one row of every sample, then the next ones: "tiled"
    any other rows                              samples are mixed, or have rows of different number: nobody can say

Shape letters: B samples; K rows of each.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compressor._utils import device_of, eval_mode, run_model, to_device

Layout = Literal["interleaved", "tiled", ""]
_SAMPLES = 3


def row_layouts(model: nn.Module, example_inputs: Any, modules: Collection[str]) -> dict[str, Layout]:
    """Return how the rows of each module's first input belong to samples; empty where that cannot be said.

    Args:
        model: runs in evaluation mode, and stays as it was.
        example_inputs: as for `trace`, with samples in dimension 0 of every tensor.
        modules: names of the modules.
    """
    found = [_seen_with_nan_in(sample, model, example_inputs, modules) for sample in range(_SAMPLES - 1)]
    return {name: _layout([seen[name] for seen in found if name in seen]) for name in modules}


def _seen_with_nan_in(
    sample: int, model: nn.Module, example_inputs: Any, modules: Collection[str]
) -> dict[str, Tensor]:
    """Return of every module's first input which rows hold NaN, `(B * K,)` bool, as far as the model runs."""
    seen: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim():
            seen[name] = args[0].isnan().reshape(len(args[0]), -1).any(1)

    with ExitStack() as hooks:
        for name in modules:
            hook = model.get_submodule(name).register_forward_pre_hook(partial(look, name))
            hooks.callback(hook.remove)
        # Code that reads values may not take NaN; then less is known, or nothing.
        with eval_mode(model), suppress(Exception):
            run_model(model, tree_map(partial(_poisoned, sample), to_device(example_inputs, device_of(model))))
    return seen


def shared_out(rows: Tensor, layout: Layout, length: int) -> Tensor:
    """Return for each of `length` rows what belongs to its sample: of `(B, ...)`, `(B * K, ...)`."""
    times = length // len(rows)
    if times == 1:
        return rows
    if layout == "interleaved":
        return rows.repeat_interleave(times, 0)
    return rows.repeat(times, *[1] * (rows.dim() - 1))


def _poisoned(sample: int, value: Any) -> Any:
    """Return three samples like the first one, one of them NaN where it can be."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    samples = value[:1].repeat(_SAMPLES, *[1] * (value.dim() - 1))
    if samples.is_floating_point():
        samples[sample] = torch.nan
    return samples


def _layout(seen: list[Tensor]) -> Layout:
    """Return what the rows with NaN say, `(B * K,)` for each of the samples that were NaN."""
    if len(seen) < _SAMPLES - 1 or any(len(rows) % _SAMPLES or len(rows) == _SAMPLES for rows in seen):
        return ""
    layouts: tuple[Layout, ...] = ("interleaved", "tiled")
    of_samples = torch.eye(_SAMPLES, dtype=torch.bool)
    for layout in layouts:
        expected = [shared_out(of_samples[sample], layout, len(rows)) for sample, rows in enumerate(seen)]
        if all(torch.equal(rows.cpu(), wanted) for rows, wanted in zip(seen, expected, strict=True)):
            return layout
    return ""
