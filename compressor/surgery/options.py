"""What becomes of what a removed channel carried."""

from __future__ import annotations

from typing import Literal, get_args

Compensation = Literal["linear", "mean", "none"]
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation)
