"""What takes part in every training step: the interface, and ordinary training.

The loop calls a hook twice a step, around what PyTorch users write anyway:

    loss = hook.loss(inputs, targets, loss_fn)
    loss.backward()
    optimizer.step()
    hook.step()
    optimizer.zero_grad(set_to_none=True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

LossFunction = Callable[..., Tensor]  # like F.cross_entropy: outputs, targets, and reduction="none" where wanted


class StepHook(Protocol):
    """What takes part in every training step."""

    def loss(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction) -> Tensor:
        """Run the model, in training mode, on one batch and return the mean loss, a scalar."""
        ...

    def step(self) -> Mapping[str, Any] | None:
        """Look at the step, after `optimizer.step()` and before gradients are cleared; may narrow the model in place.

        Parameters must stay the same objects, and the optimizer's state must be sliced along.

        Returns:
            An event for the log, made of JSON values, or None.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to go on: numbers, strings, tensors, and lists and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the model is already as narrow as it was when the state was taken."""
        ...


HookFactory = Callable[[nn.Module, Optimizer, int], StepHook]  # model, optimizer, total number of steps


class PlainStep:
    """The hook of ordinary training."""

    # The signature of every `HookFactory`, though ordinary training needs neither optimizer nor number of steps.
    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        self._model = model

    def loss(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction) -> Tensor:
        """Return the mean loss."""
        return loss_fn(self._model(inputs), targets)

    def step(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""
