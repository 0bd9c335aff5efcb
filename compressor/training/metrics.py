"""A figure of the user's own for a model: F1, mean IoU, PSNR, whatever a function returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from compressor.errors import InputError
from compressor.training.evaluation import in_mode
from compressor.training.user_code import first_line, imported, present_folder_importable

_LOWER = ":lower"


@dataclass(frozen=True)
class Metric:
    """What a function of the user's says of a model.

    Attributes:
        name: of the function.
        function: takes a model in evaluation mode, returns a number.
        higher_is_better: whether more is better.
    """

    name: str
    function: Callable[[nn.Module], float]
    higher_is_better: bool = True

    @classmethod
    def from_path(cls, path: str) -> Metric:
        """Import a metric.

        Args:
            path: `package.module:function` or `file.py:function`, and `:lower` behind it where less is better.

        Raises:
            InputError, UnknownNameError: there is no such function.
        """
        lower = path.endswith(_LOWER)
        where = path.removesuffix(_LOWER)
        with present_folder_importable():
            function = imported(where, "metric")
        return cls(where.rpartition(":")[2], function, not lower)  # type: ignore[arg-type]

    def of(self, model: nn.Module) -> float:
        """Return what the function says of a model, without gradients.

        Raises:
            InputError: it fails, or returns no finite number.
        """
        try:
            with in_mode(model, training=False), torch.no_grad():
                value = float(self.function(model))
        except Exception as error:  # the user's code
            raise InputError(
                f"metric {self.name}(model) failed: {first_line(error)}; let it return a number"
            ) from error
        if not math.isfinite(value):
            raise InputError(f"metric {self.name}(model) is {value}: let it return a finite number")
        return value
