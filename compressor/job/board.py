"""What is measured while training, for TensorBoard: `tensorboard --logdir runs` draws the runs side by side.

{"stage": "pruned", "epoch": 3, "step": 54, "train_loss": 1.2, "params": 9000}
becomes one point at step 54 in each of the curves pruned/train_loss and pruned/params
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import InputError

BOARD = "tensorboard"  # folder in the run folder
_NO_CURVE = {"epoch", "step"}


def require_tensorboard() -> None:
    """Refuse a machine without TensorBoard.

    Raises:
        InputError: says what to install.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs TensorBoard: pip install 'compressor[tensorboard]', or leave it out")


def clear_board(folder: Path) -> None:
    """Remove the curves of an earlier run, and nothing else."""
    for each in folder.glob("events.out.tfevents.*"):
        each.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


class Board:
    """Writes records as curves into a folder; a run that goes on adds to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def show(self, record: Mapping[str, Any]) -> None:
        """Add a point for every number of a record; one without a step has no place on a curve."""
        if "step" not in record:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # At the first record, when it is certain that the run may write into its folder.
            self._writer = SummaryWriter(str(self._folder))
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_CURVE:
                self._writer.add_scalar(f"{record['stage']}/{name}", value, record["step"])
        self._writer.flush()
