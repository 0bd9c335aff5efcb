"""What each cut of a pruning aims at: equal rounds, and for a cost that is predicted, measuring and cutting on.

A worked example: 50 % of the latency is to go. The first cut goes 85 % of the way by the prediction, 42.5 %; measured
are 40 %. Ten points are missing, and it may have been a busy moment: the next one aims at five more, 47.5 % predicted.
Measured are 45.1 %, so the missing 4.9 come on top, 52.4 % predicted. Measured are 49.6 %, which is within a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from compressor.budget import Budget, PruningProgress, Seen

_FIRST = 0.85  # of the way, before anything is measured: what was cut too much does not come back
_CORRECTIONS = 10
_STEP = 0.05  # at most, of each: by no more can one look that another process disturbed lead too far
_WITHIN = 0.01  # of what was asked: no two measurements are closer
_MOST = 0.98
_FAR = 0.05  # more than asked: worth saying


@dataclass
class Aims:
    """What the cuts of one pruning aim at.

    Attributes:
        budget: what is asked.
        rounds: in how many steps.
        progress: what is gone, predicted.
        look: measures the model; None where what the budget counts is exact.
        seen: what was measured last.
    """

    budget: Budget
    rounds: int
    progress: PruningProgress
    look: Callable[[], Seen] | None = None
    seen: Seen | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[tuple[Budget, float]]:
        """Yield what to cut to, and the part of the groups' own shares that is due; ask for the next one then."""
        steps = [(number + 1) / self.rounds for number in range(self.rounds)]
        if self.look is None or not self.budget.sparsity:
            yield from ((self.budget.scaled(due), due) for due in steps)
            return
        for due in (each for each in steps if each < _FIRST):
            yield self.budget.scaled(due), due
        yield self.budget.scaled(_FIRST), 1.0  # the groups' own shares are no predictions
        for _ in range(_CORRECTIONS):
            self.seen = self.look()
            if self.is_reached() or not self.progress.has_changed():
                return
            yield self._corrected(self.seen.removed), 1.0
        self.seen = self.look()

    def is_reached(self) -> bool | None:
        """Return whether as much is gone as was asked, measured; None where nothing is measured."""
        return None if self.seen is None else self.seen.removed >= self.budget.sparsity - _WITHIN

    def _corrected(self, removed: float) -> Budget:
        # Not in proportion: of a first small saving half may be noise, and twice as much would go as was asked.
        aim = self.progress.removed() + min(max(self.budget.sparsity - removed, _WITHIN), _STEP)
        return Budget(min(aim, _MOST), self.budget.measure)

    def lines(self) -> list[str]:
        """Return what to say of it: asked, predicted and measured, and a warning where they are far apart."""
        if self.seen is None:
            return []
        now = self.progress.now()
        asked, removed = self.budget.sparsity, self.seen.removed
        warnings = [self.seen.warning(now)]
        if removed - asked > _FAR:
            warnings.append(
                f"{removed:.1%} of the {self.budget.counts} went for the {asked:.1%} that were asked: what was cut too "
                "much does not come back; ask for less, or for macs"
            )
        return [self.seen.says(asked, self.progress.removed()), *filter(None, warnings)]
