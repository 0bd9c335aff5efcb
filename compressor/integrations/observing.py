"""Observe the forward passes of a loop that others wrote."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from compressor.pruning import Pruner


class ForwardObserver:
    """Runs every forward pass of a module in training inside `pruner.observe`, until `close`.

    Args:
        pruner: of the module, or of a part of it.
        module: the module that the loop calls with a batch, as the only argument or as keywords.
        inputs: takes what the module is called with, and returns the inputs of what the pruner traced.
    """

    def __init__(self, pruner: Pruner, module: nn.Module, inputs: Callable[[Any], Any]) -> None:
        self._pruner = pruner
        self._inputs = inputs
        self._open = ExitStack()
        self._handles = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            # Also where the pass ends in an error, out of memory for one: the trainer may try again.
            module.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self._open.enter_context(self._pruner.observe(self._inputs(args[0] if args else kwargs)))

    def _end(self, *_: Any) -> None:
        self._open.close()

    def close(self) -> None:
        """Leave the module as it was."""
        self._open.close()
        for handle in self._handles:
            handle.remove()
