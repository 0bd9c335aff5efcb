"""What a cut asks of the optimizers that train the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from compressor._utils import ambient_modes_disabled
from compressor.errors import InputError, OptimizerError

logger = logging.getLogger(__name__)


def all_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """Return one optimizer, several or none as a list, with those that they wrap (SAM's base optimizer)."""
    found = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    for each in found:
        found += [inner for inner in vars(each).values() if isinstance(inner, Optimizer) and inner not in found]
    return found


def require_followed(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose state a cut could not slice, before there is any: the first cut may be hours away.

    A second optimizer of the same kind takes one step on a small weight. One that cannot be made from its defaults, or
    that does not step so, is left to the first cut.

    Raises:
        InputError: it keeps tensors that do not have the shape of the weight (Adafactor's rows and columns), or lists
            of tensors (LBFGS).
    """
    for optimizer in optimizers:
        weight = nn.Parameter(torch.ones(3, 2))
        weight.grad = torch.ones(3, 2)
        for key, value in _state_after_a_step(optimizer, weight).items():
            sized = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() > 1]
            if sized and (sized != [value] or value.shape != weight.shape):
                is_tensor = sized == [value]
                what = f" of shape {tuple(value.shape)}" if is_tensor else f", a {type(value).__name__} of tensors,"
                raise InputError(
                    f"{type(optimizer).__name__} keeps {key!r}{what} for a weight of shape (3, 2), which does not say "
                    "what belongs to a channel, so it cannot go on after a cut: use SGD, Adam(W) or RMSprop"
                )


def _state_after_a_step(optimizer: Optimizer, weight: nn.Parameter) -> dict[str, Any]:
    defaults = {
        name: each for name, each in optimizer.defaults.items() if name in signature(type(optimizer)).parameters
    }
    try:
        with torch.random.fork_rng(devices=()), ambient_modes_disabled():
            twin = type(optimizer)([weight], **defaults)
            # LBFGS evaluates its loss itself: twice, or there is nothing to remember.
            losses = iter((torch.tensor(2.0), torch.tensor(1.0)))
            needs_loss = signature(twin.step).parameters.get("closure")
            if needs_loss and needs_loss.default is Parameter.empty:
                twin.step(lambda: float(next(losses, torch.tensor(0.0))))
            else:
                twin.step()
    except Exception as failure:
        logger.debug("%s could not be tried out: %s", type(optimizer).__name__, failure)
        return {}
    return dict(twin.state[weight])


def require_held(model: nn.Module, optimizers: Iterable[Optimizer], names: Iterable[str] | None = None) -> None:
    """Refuse optimizers that do not train this model: their state would not be cut or masked along.

    Args:
        model: the model.
        optimizers: those that should hold its parameters.
        names: parameters that must all be held; None asks for any trained one, as others may be left out on purpose.

    Raises:
        OptimizerError: one of `names` is held by none; or, without names, none of the model's parameters is.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad or names is not None}
    held = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
    asked = list(parameters if names is None else names)
    missing = [name for name in asked if id(parameters[name]) not in held]
    if missing and (names is not None or len(missing) == len(asked)):
        raise OptimizerError(missing, any_would_do=names is None)
