"""What a criterion may look at: the tensors of a model at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Detached values of a model's tensors at one moment.

    Attributes:
        values: parameters and buffers by name.
        gradients: gradients of parameters by name; empty where none were gathered.
        generator: source of randomness for criteria that draw; seeded by the caller.
        modules: by qualified name, for importances that walk them.
    """

    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    @staticmethod
    def from_model(model: nn.Module, generator: torch.Generator | None = None) -> Snapshot:
        """Take the model's parameters, buffers, present gradients and modules, without copying them."""
        named = dict(model.named_parameters())
        values = {name: tensor.detach() for name, tensor in [*named.items(), *model.named_buffers()]}
        gradients = {name: p.grad.detach() for name, p in named.items() if p.grad is not None}
        return Snapshot(values, gradients, generator, dict(model.named_modules()))
