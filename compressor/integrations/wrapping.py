"""Wrap a network anew after a cut where the loop is somebody else's, and holds the wrapper."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed import ProcessGroup, group
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from compressor.errors import InputError

_SETTINGS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
)
_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)


def all_ranks() -> ProcessGroup | None:
    """Return the group of all processes, None where there is one alone."""
    return group.WORLD if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1 else None


def wrap_anew(wrapped: DistributedDataParallel) -> None:
    """Let a wrapper average the gradients of its module as that is now, in place.

    It laid its buffers out for the shapes that the parameters had when it was made. A new wrapper would do, but the
    loop of a trainer keeps the old one in a variable, so that this very object is made again, as it was asked for.

    Args:
        wrapped: between two steps, on every rank.

    Raises:
        InputError: it computes in a precision of its own (`DistributedDataParallel(mixed_precision=...)`).
    """
    if wrapped.mixed_precision:
        raise InputError("DistributedDataParallel(mixed_precision=...) keeps copies of the weights: use torch.autocast")
    asked = {name: getattr(wrapped, name) for name in _SETTINGS}
    asked["bucket_cap_mb"] = wrapped.bucket_bytes_cap / 2**20
    if not wrapped.broadcast_buffers:
        asked["broadcast_buffers"] = False
    hooks = {name: getattr(wrapped, name) for name in _HOOKS}
    exchanges, training = list(wrapped._comm_hooks), wrapped.training
    wrapped.__init__(wrapped.module, **asked)  # type: ignore[misc]
    wrapped.training = training
    for hook, state in exchanges:
        wrapped.register_comm_hook(state, hook)
    for name, registered in hooks.items():
        getattr(wrapped, name).update(registered)


def when_wrapped(module: nn.Module, found: Callable[[DistributedDataParallel], None]) -> Callable[[], None]:
    """Have a function called with what wraps a module, before the wrapper runs for the first time.

    Returns:
        A function that ends the waiting.
    """

    def look(running: nn.Module, _: object) -> None:
        if isinstance(running, DistributedDataParallel) and running.module is module:
            handle.remove()
            found(running)

    handle = register_module_forward_pre_hook(look)
    return handle.remove
