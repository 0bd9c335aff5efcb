"""How long layers take at their widths, measured once on a machine and kept there.

    table = LatencyTable(Place("onnxruntime", batch=1, threads=1))
    table.surface(kind, 64, 128)(48, 96)        # nanoseconds

A layer is measured at few widths, all multiples of what the processor computes at once; between them it is
interpolated, and a width in between costs what the next multiple costs. Measured on a processor with blocks of 16:

    3x3, 56 x 56     64 -> 64: 2.04 ms     56 -> 56: 2.02     48 -> 48: 1.15     40 -> 40: 1.13     32 -> 32: 0.50
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray

from compressor._utils import atomic_write
from compressor.deploy.eager import torch_ns
from compressor.deploy.fragments import onnxruntime_ns
from compressor.deploy.layers import Kind
from compressor.deploy.machine import describe_machine
from compressor.deploy.openvino_engine import openvino_ns, openvino_version
from compressor.deploy.place import Engine, Place
from compressor.errors import InputError

_STEPS = (32, 16, 8, 4, 1)  # channels that a processor may compute at once, by which widths may be aligned
_AS_GOOD = 1.15  # a step is good if a channel costs at most so much more than at the best one
_NARROWEST = 8  # widths are measured down to this part of a layer's own
_GRID = (1.0, 1.5)  # times powers of two
_MOST_OF_GROUPED = 16  # widths of a grouped convolution that are measured

FloatArray = NDArray[np.float64]
Progress = Callable[[int, int], None]
Clock = Callable[[Kind, int, int, Place], float]
CLOCKS: dict[Engine, Clock] = {"onnxruntime": onnxruntime_ns, "openvino": openvino_ns, "torch": torch_ns}


@dataclass(frozen=True)
class Widest:
    """A layer with the widths that it has at most; `is_free` says of inputs and outputs whether they may be less."""

    kind: Kind
    inputs: int
    outputs: int
    is_free: tuple[bool, bool] = (True, True)

    def covers(self, other: Widest) -> bool:
        """Return whether what is measured of this layer says enough of another one, a narrower one say."""
        mine, theirs = (self.inputs, self.outputs), (other.inputs, other.outputs)
        return (self.kind, self.is_free) == (other.kind, other.is_free) and all(
            a >= b and (a == b or (free and b * _NARROWEST > a))
            for a, b, free in zip(mine, theirs, self.is_free, strict=True)
        )


class LatencyTable:
    """Measured times of layers in one place.

    Args:
        place: where.
        folder: where times are kept; by default the user's cache.
        clock: takes a kind, two widths and the place, returns nanoseconds; by default that of the engine.

    Raises:
        InputError: a GPU that is not there, or an engine that is not installed.
    """

    def __init__(
        self,
        place: Place,
        folder: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        if place.device == "cuda" and not torch.cuda.is_available():
            raise InputError("this machine has no usable GPU to time layers on: give cpu as the device")
        self.place = place
        self._clock = clock or CLOCKS[place.engine]
        self._path = (folder or _cache()) / f"{_name(place)}.json"
        self._known: dict[str, float] = _read(self._path)
        self._surfaces: list[tuple[Widest, Surface]] = []
        self._step: int | None = None

    @property
    def step(self) -> int:
        """The multiple at which widths pay: the least whose multiples cost little more per channel than any."""
        if self._step is None:
            kind = Kind("Conv", (14, 14), (3, 3), padding=(1, 1))
            widths = range(32, 65, 4)
            self._take([(kind, width, width) for width in widths], lambda done, total: None)
            cost = {width: self._known[_key(kind, width, width)] / width**2 for width in widths}
            best = min(cost.values())
            good = [
                step
                for step in _STEPS
                if all(each <= _AS_GOOD * best for width, each in cost.items() if width % step == 0)
            ]
            self._step = min(good, default=_STEPS[0])
        return self._step

    def prepare(self, layers: Sequence[Widest], on_progress: Progress = lambda done, total: None) -> None:
        """Measure what is not known yet of layers that have these widths at most."""
        points = list(dict.fromkeys(point for layer in layers for point in self._points(layer)))
        # In random order: a machine that slows down meanwhile makes all of them less exact, and not one of them slow.
        random.Random(0).shuffle(points)
        self._take(points, on_progress)

    def surface(self, layer: Widest) -> Surface:
        """Return the times of a layer up to its widths."""
        for known, surface in self._surfaces:
            if known.covers(layer):
                return surface
        self.prepare([layer])
        outputs = self._grid(layer.outputs, layer.is_free[1], layer.kind.groups)
        # One row, whatever comes in, where as many channels go out.
        inputs = [layer.inputs]
        if not layer.kind.has_one_width:
            inputs = self._grid(layer.inputs, layer.is_free[0], layer.kind.groups)
        times = np.array(
            [[self._known[_key(layer.kind, b if layer.kind.has_one_width else a, b)] for b in outputs] for a in inputs]
        )
        if layer.kind.groups <= 1:
            # Noise may make a narrower layer slower than a wider one; a selection would then ask for the wider one.
            times = np.maximum.accumulate(np.maximum.accumulate(times, 0), 1)
        step = self.step if layer.kind.groups <= 1 else 1
        surface = Surface(np.array(inputs), np.array(outputs), times, step)
        self._surfaces.append((layer, surface))
        return surface

    def _points(self, layer: Widest) -> list[tuple[Kind, int, int]]:
        outputs = self._grid(layer.outputs, layer.is_free[1], layer.kind.groups)
        if layer.kind.has_one_width:
            return [(layer.kind, width, width) for width in outputs]
        inputs = self._grid(layer.inputs, layer.is_free[0], layer.kind.groups)
        return [(layer.kind, a, b) for a in inputs for b in outputs]

    def _grid(self, width: int, is_free: bool, groups: int = 1) -> list[int]:
        """Return the widths at which a layer is measured: multiples of the step, an eighth to all of its own width.

        With steps of 16, of a width of 128: 16, 32, 48, 64, 96, 128; of 24: 4, 8, 16, 24.
        """
        if not is_free:
            return [width]
        if groups > 1:
            # What counts is the width of each group, and between its blocks there is a slow path: all are measured.
            every = groups * max(1, round(width / groups / _MOST_OF_GROUPED))
            return [*range(every, width, every), width]
        unit = self.step
        quarters = [max(1, unit // 4), max(1, unit // 2)]
        powers = [round(unit * part * 2**power) for power in range(17) for part in _GRID]
        multiples = [each for each in powers if each % unit == 0]
        return [*(each for each in sorted({*quarters, *multiples}) if width / _NARROWEST <= each < width), width]

    def _take(self, points: Sequence[tuple[Kind, int, int]], on_progress: Progress) -> None:
        """Measure what is not known yet, and keep it."""
        points = [point for point in points if _key(*point) not in self._known]
        for done, (kind, inputs, outputs) in enumerate(points):
            on_progress(done, len(points))
            self._known[_key(kind, inputs, outputs)] = self._clock(kind, inputs, outputs, self.place)
        if points:
            on_progress(len(points), len(points))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as part:
                part.write_text(json.dumps(self._known, indent=0))


@dataclass(frozen=True, eq=False)
class Surface:
    """Times of one layer over its widths.

    Attributes:
        inputs, outputs: `(I,)` and `(O,)` widths that were measured, ascending.
        times: `(I, O)` nanoseconds.
        step: widths in between cost what the next multiple costs.
    """

    inputs: NDArray[np.int64]
    outputs: NDArray[np.int64]
    times: FloatArray
    step: int

    def __call__(self, inputs: NDArray[np.int64], outputs: NDArray[np.int64]) -> FloatArray:
        """Return nanoseconds for pairs of widths, `(B,)` each."""
        low_in, high_in, share_in = _between(self.inputs, self._up(inputs, self.inputs))
        low_out, high_out, share_out = _between(self.outputs, self._up(outputs, self.outputs))
        near = (1 - share_out) * self.times[low_in, low_out] + share_out * self.times[low_in, high_out]
        far = (1 - share_out) * self.times[high_in, low_out] + share_out * self.times[high_in, high_out]
        found: FloatArray = (1 - share_in) * near + share_in * far
        return found

    def _up(self, widths: NDArray[np.int64], grid: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the next multiple of each width, of a quarter of the step below one step."""
        quarter = max(1, self.step // 4)
        step = np.where(widths < self.step, quarter, self.step)
        found: NDArray[np.int64] = np.minimum(-(-widths // step) * step, grid[-1])
        return found


def _between(
    grid: NDArray[np.int64], values: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
    """Return the places of the grid points around values, and how far on the way each is, in [0, 1]; clipped."""
    high = np.clip(np.searchsorted(grid, values), 0, len(grid) - 1)
    low = np.maximum(high - 1, 0)
    span = np.maximum(grid[high] - grid[low], 1)
    share = np.clip((values - grid[low]) / span, 0.0, 1.0)
    return low, high, share


def _key(kind: Kind, inputs: int, outputs: int) -> str:
    return json.dumps([dataclasses.astuple(kind), inputs, outputs], separators=(",", ":"))


def _name(place: Place) -> str:
    """Return the name of the file for a place on this machine: other processors and versions have other times."""
    machine = describe_machine()
    version = openvino_version() if place.engine == "openvino" else machine[place.engine]
    runs_on = f"{machine['cpu']} {machine['simd']} {machine['cores']}" if place.device == "cpu" else machine["gpu"]
    who = hashlib.sha256(f"{runs_on} {version}".encode()).hexdigest()[:12]
    return f"{place.engine}-{version}-{place.device}-batch{place.batch}-threads{place.threads}-{who}"


def _cache() -> Path:
    return platformdirs.user_cache_path("compressor") / "latency"


def _read(path: Path) -> dict[str, float]:
    """Return what was measured; nothing, if the file cannot be read: it is measured again."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and all(isinstance(each, float) for each in known.values()) else {}
