"""How far a ranking can be trusted: by how well two interleaved halves of the steps agree on it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import Tensor

from compressor.relevance.statistics import rank_correlation

RELIABLE = 0.3  # rank correlation; below it a selection is as good as random
logger = logging.getLogger(__name__)


def split_half_reliability(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Return by group name the rank correlation of two rankings, `(C,)` each, in [-1, 1].

    Each half has half of the steps: the whole is more reliable than that. It is not corrected for (Spearman-Brown).
    """
    return {name: rank_correlation(ranking, second[name]) for name, ranking in first.items()}


def warn_if_unreliable(reliability: Mapping[str, float], cut: Collection[str]) -> None:
    """Log one warning that names the groups that were cut by a ranking that is as good as random, if there are any."""
    weak = [f"{name} ({value:.2f})" for name, value in reliability.items() if name in cut and value < RELIABLE]
    if weak:
        logger.warning("cut by a ranking as good as random (reliability below %g): %s", RELIABLE, ", ".join(weak))
