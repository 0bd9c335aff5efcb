"""What is asked of a loss function."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from compressor.errors import InputError


def require_reduction(loss_fn: Callable[..., Tensor]) -> None:
    """Refuse a loss that takes no `reduction=`: a loss for each sample could not be asked of it.

    Raises:
        InputError: it is called otherwise; the message says how to write it.
    """
    # Of a module it is `forward` that tells: `__call__` takes everything.
    called = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        signature = inspect.signature(called)
        signature.bind("outputs", "targets", reduction="none")
        signature.bind("outputs", "targets")
    except ValueError:  # a function of a compiled library, which does not say how it is called
        return
    except TypeError as failure:
        raise InputError(
            f"loss_fn must take outputs, targets and reduction=, which may be left out ({failure}): give "
            "torch.nn.functional.cross_entropy itself, functools.partial(cross_entropy, label_smoothing=0.1), or "
            "lambda outputs, targets, reduction='mean': ..."
        ) from None
