"""Where the time goes: every layer's time before and after, beside what its weights alone would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from compressor.budget import ALIGNED
from compressor.report.document import LayerTime
from compressor.report.tables import milliseconds

HEAD = ("layer", "ms dense", "ms pruned", "as fast", "by its weights", "")
SHOWN = 20  # the layers that took longest
_REALISED = 0.75  # of the time that the weights would save; above, a layer got as fast as it should
_SHORT_MS = 0.02


def layer_rows(layers: Sequence[LayerTime]) -> list[tuple[str, ...]]:
    """Return a row for each layer, those that took longest in the dense model first, and one for all others."""
    by_time = sorted(layers, key=lambda each: -each.dense_ms)
    shown = [each for each in by_time if each.dense][:SHOWN]
    others = [each for each in by_time if each not in shown]
    rows: list[tuple[str, ...]] = [
        (each.name, *_times(each.dense_ms, each.pruned_ms), f"{_promised(each):.2f}×", remark(each)) for each in shown
    ]
    if others:
        times = _times(sum(each.dense_ms for each in others), sum(each.pruned_ms for each in others))
        rows.append(("everything else", *times, "", ""))
    return rows


def remark(layer: LayerTime) -> str:
    """Return why a layer did not get as much faster as it has fewer weights; empty where it did."""
    promised = _promised(layer)
    if promised < 1.05 or layer.dense_ms <= 0:
        return ""
    saved = 1 - layer.pruned_ms / layer.dense_ms
    if saved >= _REALISED * (1 - 1 / promised):
        return ""
    return "; ".join(_reasons(layer)) or "not by its widths: memory, or another kernel"


def _reasons(layer: LayerTime) -> Iterator[str]:
    out, per_block = layer.pruned[:2]
    if layer.pruned_ms < _SHORT_MS:
        yield "so short that the call itself takes most of it"
    if per_block == 1 == layer.dense[1]:
        yield "depthwise: memory takes the time, not arithmetic"
    # Of a fully connected layer the kernel is a matrix product of any size.
    is_convolution = len(layer.pruned) > 2
    for width, before, side in zip((out, per_block), layer.dense, ("output", "input"), strict=False):
        if is_convolution and width != before and width % ALIGNED:
            near = ALIGNED * max(1, round(width / ALIGNED))
            yield f"{width} {side} channels are no multiple of {ALIGNED} ({near} is)"


def _promised(layer: LayerTime) -> float:
    """Return how many times as fast a layer would be if its weights alone decided."""
    return prod(layer.dense) / max(prod(layer.pruned), 1)


def _times(dense_ms: float, pruned_ms: float) -> tuple[str, str, str]:
    ratio = f"{dense_ms / pruned_ms:.2f}×" if pruned_ms else "-"
    return milliseconds(dense_ms), milliseconds(pruned_ms), ratio
