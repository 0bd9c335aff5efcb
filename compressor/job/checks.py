"""What the options of a run can mean together: names that exist, and options that have an effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from compressor import criteria
from compressor.budget import MEASURES
from compressor.deploy import PRECISIONS
from compressor.errors import InputError, UnknownNameError
from compressor.job.options import as_typed
from compressor.sparse import Method

OBSERVING = "relevance"  # the criterion that observes the training instead of looking at weights
TORCH_PRUNING = "tp:"  # what names of Torch-Pruning's importances begin with

Values = Mapping[str, Any]


def criterion_names() -> list[str]:
    """Return the names that `--criterion` takes, but for those of Torch-Pruning."""
    return [OBSERVING, *get_args(Method), *criteria.CRITERIA]


def is_sparse(criterion: str) -> bool:
    """Return whether a criterion trains under masks instead of scoring channels."""
    return criterion in get_args(Method)


def has_teacher(given: Values) -> bool:
    """Return whether the pruned model learns from another one, said so or not.

    After training there is one already, the model as it was, if there is any training after it.
    """
    if given["distill"] is not None:
        return bool(given["distill"])
    epochs = given["epochs"] if given["finetune_epochs"] is None else given["finetune_epochs"]
    return not is_during(given) and epochs != 0


def has_schedule(criterion: str) -> bool:
    """Return whether more and more goes in training; the others are sparse from the beginning."""
    return criterion not in ("set", "rigl")


def is_during(given: Values) -> bool:
    """Return whether pruning goes on during the training, said so or not."""
    trains = given["criterion"] == OBSERVING or is_sparse(given["criterion"])
    return given["when"] == "during" or (trains and given["when"] is None)


def observes(given: Values) -> bool:
    """Return whether relevance is gathered from the training steps."""
    return given["criterion"] == OBSERVING and is_during(given)


def require_names(given: Values) -> None:
    """Refuse a criterion or another name that does not exist, where no component's config looks at it.

    Raises:
        UnknownNameError: says what is close.
    """
    if given["criterion"].startswith(TORCH_PRUNING):
        criteria.lookup(given["criterion"])
    elif given["criterion"] not in criterion_names():
        raise UnknownNameError("criterion", given["criterion"], criterion_names())
    measures = (*MEASURES, "latency")
    for name, known in (
        ("stem", ("imagenet", "cifar")),
        ("when", ("during", "after")),
        ("measure", measures),
        ("precision", PRECISIONS),
    ):
        if given[name] is not None and given[name] not in known:
            raise UnknownNameError(name, given[name], known)


def require_effects(given: Values, usual: Values) -> None:
    """Refuse what contradicts itself or would do nothing.

    Args:
        given: every option by name; None where it is left open.
        usual: what each is when nothing is typed.

    Raises:
        InputError: says what to leave out.
    """
    criterion = given["criterion"]
    if given["when"] == "after" and is_sparse(criterion):
        raise InputError(
            f"--criterion {criterion} changes its masks in training: leave out --when after, or choose another "
            "criterion"
        )
    if given["allocate"] == "relevance" and is_during(given) and criterion != OBSERVING:
        raise InputError(f"--allocate relevance needs --when after with --criterion {criterion}: give one of them up")
    if given["threshold"] is not None and given["sparsity"] is not None:
        raise InputError("--sparsity and --threshold both say how much goes: leave one of them out")
    if given["threshold"] is not None and criterion == OBSERVING and not is_during(given):
        raise InputError(
            "--threshold with --criterion relevance is a confidence, which is gathered in training: leave out --when "
            "after, or give --sparsity"
        )
    for name, other in idle_options(given).items():
        if other and given[name] != usual[name]:
            typed = {"sparsity_by_pattern": "sparsity PATTERN=...", "verify": "no-verify"}.get(name, as_typed(name))
            raise InputError(f"--{typed} has no effect with {other}: leave one of them out")


def idle_options(given: Values) -> dict[str, str]:
    """Return, by option, what makes it idle; nothing where it has an effect."""
    criterion = f"--criterion {given['criterion']}"
    data = given["data"]
    observing = observes(given)
    unobserved = criterion if given["criterion"] != OBSERVING else "--when after"
    sparse = is_sparse(given["criterion"])
    weights = "--granularity weight" if sparse and given["granularity"] != "channel" else ""
    relevance = ("relevance_estimator", "exclude", "drop", "observe_every", "confidence", "dummies", "warmup")
    threshold = "--threshold" if given["threshold"] is not None else ""
    is_timed = given["measure"] == "latency" or given["round_to"] == "auto"
    unmeasured = "" if is_timed else f"--measure {given['measure']}"
    return {
        "threshold": criterion if sparse else "",
        "measure": threshold or weights,
        "allocate": threshold,
        "finetune_epochs": "--when during" if is_during(given) else "",
        "prune_every": "" if is_during(given) else "--when after",
        **dict.fromkeys(
            ("first_cut", "last_cut"),
            "--when after" if not is_during(given) else "" if has_schedule(given["criterion"]) else criterion,
        ),
        "download": "" if data in ("cifar10", "cifar100") else f"--data {data}",
        "cache": "" if data.startswith("imagefolder:") else f"--data {data}",
        "rounds": "--when during" if is_during(given) else threshold,
        "reconstruct": "--when during" if is_during(given) and given["reconstruct"] else "",
        **dict.fromkeys(relevance, "" if observing else unobserved),
        **dict.fromkeys(("target_engine", "target_device", "target_batch", "target_threads"), unmeasured),
        **dict.fromkeys(
            ("tolerance", "qat_epochs"), "" if given["precision"] == "int8" else f"--precision {given['precision']}"
        ),
        **dict.fromkeys(("temperature", "teacher"), "" if has_teacher(given) else "--distill 0"),
        "distill": "--finetune-epochs 0"
        if given["distill"] and not is_during(given) and given["finetune_epochs"] == 0
        else "",
        "granularity": "" if sparse else criterion,
        "ema": criterion if sparse else "",  # an average of differently masked weights has no zeros
        **dict.fromkeys(("compensate", "recalibrate", "verify"), criterion if sparse else ""),
        **dict.fromkeys(("round_to", "keep", "only", "sparsity_by_pattern"), weights),
    }
