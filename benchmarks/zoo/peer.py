"""Build and cut half, timed beside Torch-Pruning in the same process: A B A B, in single precision.

Neither side scores channels: ours keeps a random half, theirs gets `RandomImportance`. What is timed is the trace or
dependency graph, and the cut. Every run gets a fresh copy of the model, made outside the timed part.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from types import FrameType
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

import compressor
from compressor.errors import CutError
from zoo.check import Case, Row, half

ROUNDS = 5
SLOW_S = 20.0


class _TimeUp(BaseException):
    """The limit has passed. Not an `Exception`: Torch-Pruning catches those on its way."""


def beside_torch_pruning(case: Case, limit_s: int, row: Row) -> None:
    """Time both sides, and write medians, ranges, n, and how it went with Torch-Pruning into the row.

    Where one of their runs takes more than 20 s, they run three times; above 60 s once.
    """
    template, x = case.build().eval(), case.inputs()
    ours: list[float] = []
    theirs: list[float] = []
    rounds = ROUNDS
    row["Torch-Pruning"] = "ok"
    for turn in range(ROUNDS):
        ours.append(timed(build_and_cut, copy.deepcopy(template), x))
        if turn < rounds:
            rounds = min(rounds, _their_turn(template, x, limit_s, theirs, row))
    row |= _figures("ours", ours) | _figures("theirs", theirs)
    if theirs:
        row["ratio"] = median(theirs) / median(ours)


def _their_turn(template: nn.Module, x: Any, limit_s: int, theirs: list[float], row: Row) -> int:
    """Let Torch-Pruning run once; give how many rounds it is to have in all."""
    model = copy.deepcopy(template)
    try:
        with _limited(limit_s), _quiet():
            theirs.append(timed(build_and_cut_by_torch_pruning, model, x))
    except _TimeUp:
        row["Torch-Pruning"] = f"did not finish in {limit_s} s"
        return 0
    except Exception as failure:
        row["Torch-Pruning"] = _short("raises", failure)
        return 0
    if len(theirs) == 1:
        row["Torch-Pruning"] = _forward(model, x)
    return ROUNDS if theirs[-1] <= 1e3 * SLOW_S else 3 if theirs[-1] <= 3e3 * SLOW_S else 1


def _forward(model: nn.Module, x: Any) -> str:
    try:
        with torch.no_grad(), _quiet():
            model(x)
    except Exception as failure:
        return _short("forward fails after the cut:", failure)
    return "ok"


def _short(what: str, failure: Exception) -> str:
    return " ".join(f"{what} {type(failure).__name__}: {failure}".split())[:160]


def timed(run: Callable[..., object], *args: Any) -> float:
    """Return how long a call takes, in milliseconds; rubbish of earlier ones is collected first."""
    gc.collect()
    start = time.perf_counter()
    run(*args)
    return 1e3 * (time.perf_counter() - start)


def _figures(who: str, samples_ms: Sequence[float]) -> Row:
    if not samples_ms:
        return {}
    spread = f"{min(samples_ms):.4g} to {max(samples_ms):.4g}"
    return {f"{who} ms": median(samples_ms), f"{who} range ms": spread, f"{who} n": len(samples_ms)}


# -- the two sides


def build_and_cut(model: nn.Module, x: Any) -> compressor.ChannelGraph:
    """Trace, and cut half of everything; groups that refuse are frozen on the way, which counts."""
    graph = compressor.trace(model, x)
    cut_half(graph)
    return graph


def cut_half(graph: compressor.ChannelGraph) -> None:
    """Cut half of every group; a group that refuses is frozen, and the others are tried again without it."""
    while keep := half(graph):
        try:
            return compressor.cut(graph, keep)
        except CutError as refusal:
            if not set(refusal.groups) & set(graph.sizes()):
                raise
            graph.freeze(refusal.groups, refusal.reason)
    return None


def build_and_cut_by_torch_pruning(model: nn.Module, x: Any) -> None:
    """Do the same with Torch-Pruning, as its documentation says: the classifier left alone, one step."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    pruner = tp.pruner.BasePruner(
        model, x, importance=tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=layers[-1:]
    )
    pruner.step()


# -- limits


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Stop the block after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch-Pruning warns and prints; that would tear the progress bar."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
