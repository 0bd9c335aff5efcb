"""Multiply-adds as fvcore counts them: a second opinion beside our own count."""

from __future__ import annotations

import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compressor._utils import as_arguments, eval_mode

logger = logging.getLogger(__name__)

# The operations whose count is multiply-adds. fvcore also counts normalisation (two per value of a BatchNorm in
# evaluation mode), adaptive pooling (one per input value) and resizing, which are not: a few percent of a ResNet.
# It knows no fused attention at all.
MULTIPLY_ADDS = ("conv", "linear", "addmm", "mm", "bmm", "matmul", "einsum")


def fvcore_macs(model: nn.Module, example_inputs: Any) -> int:
    """Return the multiply-adds of convolutions, Linear layers and matrix products; the model is left as it was.

    Args:
        model: any module that `torch.jit.trace` can follow.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the count is for this batch.
    """
    args, kwargs = as_arguments(example_inputs)
    traced = _ByKeyword(model, list(kwargs)) if kwargs else model
    with eval_mode(model), _no_hooks_left(model):
        counts = _counts(traced, tuple(kwargs.values()) if kwargs else args)
    return int(sum(counts[name] for name in MULTIPLY_ADDS))


def _counts(model: nn.Module, inputs: tuple[Any, ...]) -> Counter[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its import scripts a loss function, which torch deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis
    analysis = FlopCountAnalysis(model, inputs).tracer_warnings("none")
    # fvcore's own warnings come once for each op and to its own logger; ours is one line.
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts: Counter[str] = analysis.by_operator()
    if unknown := sorted(analysis.unsupported_ops()):
        logger.info("fvcore has no count for %s: they add nothing to its figure", ", ".join(unknown))
    return counts


class _ByKeyword(nn.Module):
    """Lets fvcore, which knows positional inputs only, call a model by keyword."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True)))


@contextmanager
def _no_hooks_left(model: nn.Module) -> Iterator[None]:
    """Take away the hooks that fvcore leaves on a model that does not run."""
    tables = [table for module in model.modules() for table in (module._forward_hooks, module._forward_pre_hooks)]
    before: list[OrderedDict[int, Any]] = [OrderedDict(table) for table in tables]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)
