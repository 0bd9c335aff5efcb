"""Where and in which precision a network is to run; no torch here, the command line's help reads these names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from compressor.errors import InputError, RangeError, UnknownNameError

Engine = Literal["onnxruntime", "openvino", "torch"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Target = Literal["x86-vnni", "x86", "arm", "tensorrt"]  # of int8
TARGETS: tuple[Target, ...] = get_args(Target)
TOLERANCE = 0.01  # of accuracy, that int8 may lose


@dataclass(frozen=True)
class Place:
    """Where a network is to run.

    Attributes:
        engine: "onnxruntime", "openvino" or "torch".
        device: "cpu"; or "cuda" for torch, whose kernels run as one CUDA graph then.
        batch: images at once.
        threads: of one operator on a CPU.

    Raises:
        UnknownNameError, RangeError: something that there is not.
        InputError: an engine whose layers cannot be timed on that device.
    """

    engine: Engine = "onnxruntime"
    device: Device = "cpu"
    batch: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        """Check the names and the ranges."""
        if self.engine not in ENGINES:
            raise UnknownNameError("engine", self.engine, ENGINES)
        if self.device not in DEVICES:
            raise UnknownNameError("device", self.device, DEVICES)
        if self.device == "cuda" and self.engine != "torch":
            raise InputError(f"layers are timed on a GPU in torch only, not in {self.engine}: give torch as the engine")
        for name, value in (("batch", self.batch), ("threads", self.threads)):
            if value < 1:
                raise RangeError(name, value, "1, 2, 3, ...")

    def describe(self) -> str:
        """Return the place in words."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ", CUDA graph"
        return f"{self.engine}, {self.device}, batch {self.batch}{threads}"
