"""What stands around one run of a model under trace: evaluation mode, its own state kept, attention taken apart."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from compressor._utils import eval_mode
from compressor.graph.attention import headwise
from compressor.graph.attributes import is_torch_module
from compressor.graph.context import TraceContext
from compressor.graph.recurrent import one_step


@contextlib.contextmanager
def preserve_module_state(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run without gradients, and undo what a model writes into itself: its caches must not keep meta tensors.

    Evaluation mode, unless `training`. Hooks that a model installs in its first run are undone too: so is the flag that
    says they are there, and the next run would install them twice.
    """
    modules = list(model.modules())
    # torch's own modules keep nothing of a run; but a hook may (a weight that is made of others, as weight_norm does).
    own = [vars(module) for module in modules if not is_torch_module(module) or module._forward_pre_hooks]
    hooks = [vars(module)[name] for module in modules for name in _FORWARD_HOOKS]
    installed = {index: dict(each) for index, each in enumerate(hooks) if each}  # nearly all are empty
    saved = [_SavedContents(each) for each in own]
    # One level deep: caches are dicts and lists of tensors.
    saved += [
        _SavedContents(value)
        for each in own
        for key, value in each.items()
        if key not in _NO_STATE and _may_hold_tensors(value)
    ]
    try:
        with eval_mode(model):
            if training:
                model.train()
            yield
    finally:
        for each in saved:
            each.restore()
        for index, each in enumerate(hooks):
            if (each or index in installed) and each.keys() != installed.get(index, {}).keys():
                each.clear()
                each.update(installed.get(index, {}))


_NO_STATE = vars(nn.Module()).keys() - {"_buffers"}
_FORWARD_HOOKS = tuple(
    name for name, value in vars(nn.Module()).items() if name.startswith("_forward") and isinstance(value, dict)
)


def _may_hold_tensors(value: Any) -> bool:
    """Return whether a module's attribute may hold tensors of its own: a container, or an object that is no module."""
    return isinstance(value, dict | list) or (
        hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type)
    )


class _SavedContents:
    """What a dict, a list or an object holds, and how to put that back into the same one."""

    def __init__(self, holder: Any) -> None:
        self._holder: Any = holder if isinstance(holder, dict | list) else vars(holder)
        self._copy: Any = dict(self._holder) if isinstance(self._holder, dict) else list(self._holder)

    def restore(self) -> None:
        """Write the contents back where they changed, into the same object: others may refer to it."""
        # NOTE: By the methods of dict and list themselves: a subclass may forbid its own (diffusers' FrozenDict).
        if isinstance(self._copy, dict):
            same_keys = list(self._holder) == list(self._copy)
            if not (same_keys and all(map(operator.is_, dict.values(self._holder), self._copy.values()))):
                dict.clear(self._holder)
                dict.update(self._holder, self._copy)
        elif len(self._holder) != len(self._copy) or not all(map(operator.is_, self._holder, self._copy)):
            list.clear(self._holder)
            list.extend(self._holder, self._copy)


@contextlib.contextmanager
def decomposed_layers(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run attention and recurrent layers as the operations that they consist of, which rules can look into."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with headwise(modules.values()), one_step(modules.values()):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def compiled_parts_eager(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run submodules that `torch.compile` wrapped as they are: the compiler would look into our own code."""
    is_compiled = any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in modules.values())
    # Only then: the stance is of torch._dynamo, whose import takes seconds.
    with torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def module_names(modules: Mapping[str, nn.Module], context: TraceContext) -> Iterator[None]:
    """Keep `context.module` the qualified name of the module that runs, for reasons that name it."""
    names = {id(module): name for name, module in modules.items()}
    stack = [""]
    thread = threading.get_ident()

    # Global hooks, because a hook on the model's own modules would change their hook state; other threads' runs of
    # other models meet them too, and are none of our business.
    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != thread:
            return
        stack.append(names.get(id(module), stack[-1]))
        context.module = stack[-1]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        stack.pop()
        context.module = stack[-1]

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
