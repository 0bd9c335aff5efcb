"""A moving average of a model's weights, which is what is looked at and kept in the end.

A step's weights count 1 - decay, those before them decay times what they counted: with 0.999 it is about the last
thousand steps. In the beginning fewer count, or the first weights would stay in it for long.

Source: Polyak & Juditsky, SIAM J. Control Optim. 30(4), 1992; the rise of the decay as in TensorFlow's
ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """The average of a model's parameters and floating-point buffers; begins anew where a cut has changed a shape."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._steps = 0
        self._means: list[Tensor] = []

    def _own(self) -> list[Tensor]:
        tensors = (*self._model.parameters(), *self._model.buffers())
        return [tensor for tensor in tensors if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now, after a step."""
        own = self._own()
        if [each.shape for each in own] != [each.shape for each in self._means]:
            self._steps, self._means = 0, [each.detach().clone() for each in own]
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        get_ema_multi_avg_fn(decay)(self._means, own, self._steps)  # type: ignore[no-untyped-call]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages in this `with`."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        """Let the model have the averages from now on; a second time gives it its own weights back."""
        own = self._own() if self._means else []
        for index, tensor in enumerate(own):
            # By pointer: the optimizer and the caller hold these parameters.
            tensor.data, self._means[index] = self._means[index], tensor.data

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes."""
        return {"steps": self._steps, "means": self._means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._steps = int(state["steps"])
        self._means = [mean.to(own) for mean, own in zip(state["means"], self._own(), strict=bool(state["means"]))]
