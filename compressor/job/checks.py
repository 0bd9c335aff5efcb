"""What a run may be asked for: names that exist, numbers in their range, options that have an effect together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compressor.errors import InputError, RangeError, UnknownNameError

if TYPE_CHECKING:
    from compressor.job.settings import Settings

OBSERVING = "relevance"  # the criterion that watches the training instead of looking at weights


def check(settings: Settings) -> None:
    """Refuse settings that cannot be followed.

    Raises:
        UnknownNameError: a criterion, measure, scope, ... that does not exist.
        RangeError: a number outside its range.
        InputError: options that contradict each other, or would have no effect.
    """
    _check_names(settings)
    _check_ranges(settings)
    _check_effects(settings)


def criteria() -> list[str]:
    """Give the names that `--criterion` takes."""
    from compressor.criteria import CRITERIA  # imports torch
    from compressor.sparse import METHODS

    return [OBSERVING, *METHODS, *CRITERIA]


def masking(criterion: str) -> bool:
    """Tell whether a criterion trains under masks instead of scoring channels."""
    from compressor.sparse import METHODS

    return criterion in METHODS


def _check_names(settings: Settings) -> None:
    from compressor.budget import MEASURES
    from compressor.criteria import lookup
    from compressor.relevance import ESTIMATORS
    from compressor.sparse import ALLOCATIONS, GRANULARITIES
    from compressor.surgery import COMPENSATIONS

    if settings.criterion.startswith("tp:"):
        lookup(settings.criterion)
    tables = {
        "criterion": [settings.criterion] if settings.criterion.startswith("tp:") else criteria(),
        "measure": MEASURES,
        "scope": ("global", "local"),
        "stem": ("imagenet", "cifar"),
        "when": ("during", "after"),
        "relevance_estimator": ESTIMATORS,
        "compensate": COMPENSATIONS,
        "granularity": GRANULARITIES,
        "allocation": (*ALLOCATIONS, "global"),
    }
    for name, known in tables.items():
        value = getattr(settings, name)
        if value is not None and value not in known:
            raise UnknownNameError(name.replace("_", " "), value, known)


def _check_ranges(settings: Settings) -> None:
    allowed: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "sparsity": ("[0, 1)", lambda x: 0 <= x < 1),
        "round_to": ("1, 2, 3, ...", lambda x: x >= 1),
        "recalibrate": ("0, 2, 3, 4, ...", lambda x: x == 0 or x >= 2),
        "epochs": ("1, 2, 3, ...", lambda x: x >= 1),
        "finetune_epochs": ("0, 1, 2, ...", lambda x: x >= 0),
        "batch_size": ("2, 3, 4, ...", lambda x: x >= 2),
        "lr": ("(0, inf)", lambda x: 0 < x < float("inf")),
        "drop": ("(0, 0.5]", lambda x: 0 < x <= 0.5),
        "delta": ("(0, 1]", lambda x: 0 < x <= 1),
        "dummies": ("10, 11, 12, ...", lambda x: x >= 10),
        "observe_every": ("1, 2, 3, ...", lambda x: x >= 1),
        "warmup": ("0, 1, 2, ...", lambda x: x >= 0),
        "collect": ("1, 2, 3, ...", lambda x: x >= 1),
        "seed": ("0 to 2**63 - 1", lambda x: 0 <= x < 2**63),
    }
    for name, (text, is_allowed) in allowed.items():
        value = getattr(settings, name)
        if value is not None and not is_allowed(value):
            raise RangeError(name.replace("_", "-"), value, text)


def _check_effects(settings: Settings) -> None:
    """Refuse what contradicts itself or would do nothing."""
    observing = settings.criterion == OBSERVING
    if observing and settings.when == "after":
        raise InputError(
            f"--criterion {OBSERVING} watches the training: leave out --when after, or choose another criterion"
        )
    masked = masking(settings.criterion)
    if masked and settings.when == "after":
        raise InputError(
            f"--criterion {settings.criterion} changes its masks in training: leave out --when after, "
            "or choose another criterion"
        )
    during = settings.when == "during" or ((observing or masked) and settings.when is None)
    without_effect = {
        "finetune_epochs": "--when during" if during else "",
        "collect": "" if during else "--when after",
        "download": "" if settings.data in ("cifar10", "cifar100") else f"--data {settings.data}",
        **dict.fromkeys(
            ("relevance_estimator", "drop", "observe_every", "delta", "dummies", "warmup"),
            "" if observing else f"--criterion {settings.criterion}",
        ),
        **dict.fromkeys(("granularity", "allocation"), "" if masked else f"--criterion {settings.criterion}"),
        "scope": f"--criterion {settings.criterion}" if masked else "",
        **dict.fromkeys(("compensate", "recalibrate", "verify"), f"--criterion {settings.criterion}" if masked else ""),
        **dict.fromkeys(
            ("measure", "round_to", "keep", "only", "sparsity_by_pattern"),
            "--granularity weight" if masked and settings.granularity != "channel" else "",
        ),
    }
    usual = {item.name: item.default for item in dataclasses.fields(settings)}
    for name, other in without_effect.items():
        if other and getattr(settings, name) != usual[name]:
            typed = {"sparsity_by_pattern": "sparsity PATTERN=...", "verify": "no-verify"}.get(name, name)
            raise InputError(f"--{typed.replace('_', '-')} has no effect with {other}: leave one of them out")
