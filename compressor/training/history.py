"""What a training leaves behind: one record an epoch, and the events between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class History:
    """What happened in a training, in order; a resumed one has the records from before as well.

    Attributes:
        records: one a finished epoch, with `epoch` (from 1), `step`, `train_loss`, `validation_accuracy` in `[0, 1]`,
            `validation_loss`, `lr` (of the last step), `seconds` and `params`; and the hook's events between them, with
            `event`, `epoch` and `step`.
    """

    records: tuple[dict[str, Any], ...]

    @property
    def epochs(self) -> tuple[dict[str, Any], ...]:
        """The records of epochs."""
        return tuple(record for record in self.records if "event" not in record)

    @property
    def events(self) -> tuple[dict[str, Any], ...]:
        """The hook's events."""
        return tuple(record for record in self.records if "event" in record)
