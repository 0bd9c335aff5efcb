"""What a cut asks of the optimizers that train the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from compressor.errors import OptimizerError


def as_list(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """Return one optimizer, several or none as a list."""
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())


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
