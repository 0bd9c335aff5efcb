"""What stands around one run of a model under trace: evaluation mode, its own state kept, attention taken apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from compressor._utils import evaluating
from compressor.graph.attention import headwise
from compressor.graph.context import Flow
from compressor.graph.sizes import is_torchs_own


@contextlib.contextmanager
def undisturbed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Evaluate, and take back what a model writes into itself: tensors without data must not stay in its caches."""
    own = [vars(module) for module in modules.values() if not is_torchs_own(module)]
    kept = [_Contents(each) for each in own]
    kept += [_Contents(v) for each in own for key, v in each.items() if key not in _NO_STATE and _holds(v)]
    try:
        with evaluating(model):
            yield
    finally:
        for each in kept:
            each.put_back()


_NO_STATE = vars(nn.Module()).keys() - {"_buffers"}


def _holds(value: Any) -> bool:
    """Tell whether a module's attribute may hold tensors of its own: a container, or an object that is no module."""
    return isinstance(value, dict | list) or (
        hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type)
    )


class _Contents:
    """What a dict, a list or an object holds, and how to put that back into the same one."""

    def __init__(self, holder: Any) -> None:
        self._holder: Any = holder if isinstance(holder, dict | list) else vars(holder)
        self._copy: Any = self._holder.copy()

    def put_back(self) -> None:
        """Write the contents back."""
        self._holder.clear()
        if isinstance(self._copy, dict):
            self._holder.update(self._copy)
        else:
            self._holder.extend(self._copy)


@contextlib.contextmanager
def plain_attention(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let attention run as the operations that it consists of, head by head, not as one that no rule can look into."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with headwise(modules.values()):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def module_names(modules: Mapping[str, nn.Module], flow: Flow) -> Iterator[None]:
    """Keep `flow.module` the qualified name of the module that runs."""
    names = {id(module): name for name, module in modules.items()}
    stack = [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))
        flow.module = stack[-1]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        flow.module = stack[-1]

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
