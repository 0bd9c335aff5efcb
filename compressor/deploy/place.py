"""Where and in which precision a network is to run; no torch here, the command line's help reads these names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from compressor.errors import RangeError, UnknownNameError

Engine = Literal["onnxruntime", "openvino", "torch"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Target = Literal["x86-vnni", "x86", "arm", "tensorrt"]  # of int8
TARGETS: tuple[Target, ...] = get_args(Target)
TOLERANCE = 0.01  # of accuracy, that int8 may lose


@dataclass(frozen=True)
class Place:
    """Where a network is to run.

    Attributes:
        engine: "onnxruntime", "openvino" or "torch", on the CPU.
        batch: images at once.
        threads: of one operator.

    Raises:
        UnknownNameError, RangeError: something that there is not.
    """

    engine: Engine = "onnxruntime"
    batch: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        """Check the name and the ranges."""
        if self.engine not in ENGINES:
            raise UnknownNameError("engine", self.engine, ENGINES)
        for name, value in (("batch", self.batch), ("threads", self.threads)):
            if value < 1:
                raise RangeError(name, value, "1, 2, 3, ...")

    def describe(self) -> str:
        """Return the place in words."""
        return f"{self.engine}, cpu, batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}"
