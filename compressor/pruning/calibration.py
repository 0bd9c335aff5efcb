"""Calibration batches: what is wrong with them is said before anything is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from compressor._utils import count_samples, eval_mode, run_batch
from compressor.errors import InputError


def require_batches(batches: Sequence[Any], example_inputs: Any) -> None:
    """Refuse batches that no statistic can be taken from.

    Args:
        batches: inputs of the model, without targets.
        example_inputs: what the model takes.

    Raises:
        InputError: a batch without samples, or a pair of inputs and targets for a model that takes one tensor.
    """
    for index, batch in enumerate(batches):
        # What a DataLoader gives: the model would get the targets as a second argument.
        if isinstance(example_inputs, Tensor) and isinstance(batch, tuple | list) and len(batch) == 2:
            raise InputError(
                f"calibration[{index}] is a pair, and targets are read by a loss_fn alone: pass "
                "calibration=[inputs for inputs, targets in pairs]"
            )
        if count_samples(batch) == 0:
            raise InputError(f"calibration[{index}] has no samples: leave it out")


def require_runs(model: nn.Module, batches: Sequence[Any]) -> None:
    """Refuse batches that the model does not run on; it is left as it was.

    Raises:
        InputError: there is one.
    """
    with eval_mode(model):
        for batch in batches:
            run_batch(model, batch)
