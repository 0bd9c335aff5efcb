"""One batch under the gates, from its forward pass to the statistics.

Shape letters: B samples; N channels of all groups, side by side; G groups; D dummies of each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor._utils import Ranks
from compressor.errors import InputError


@contextmanager
def preserve_buffers_and_rng(model: nn.Module) -> Iterator[None]:
    """Run the model inside the `with` without gradients; afterwards buffers and random states are as before.

    What runs next draws the same dropout, so that its losses differ by the gates alone.
    """
    # The model stays in training mode, or BatchNorm would normalise by other numbers than it does under the gates. Its
    # running statistics then move, and are put back.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


def per_sample(losses: Tensor) -> Tensor:
    """Return one loss per sample, `(B,)`, where a loss function returned one per position."""
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


class Observation:
    """One batch under the gates: who was drawn, and what came of it.

    Attributes:
        gates: `(B, N)`; their gradient is read after `backward()`.
        draw: `(B, N)` or `(B, N + D * G)` bool.
        losses: `(B,)`, detached, once they are credited; None where only gradients tell.
        ungated: `(B,)`, detached, the losses of the same samples without gates, where they are known.
        share: `(B,)`, the gradient of what `backward()` started from by every sample's loss: 1/B for a mean, times the
            factor of a gradient scaler, over the number of accumulated batches.
    """

    def __init__(self, gates: Tensor, draw: Tensor) -> None:
        self.gates = gates
        self.draw = draw
        self.losses: Tensor | None = None
        self.ungated: Tensor | None = None
        self.share: Tensor | None = None
        self.gated_modules: set[str] = set()
        self._has_gradients = False

    @property
    def awaits_backward(self) -> bool:
        """Whether gradients are to come, and `backward()` has not come yet."""
        if self.losses is None:
            return self.gates.grad is None
        return self._has_gradients and self.share is None

    def credit(self, losses: Tensor, ungated: Tensor | None = None) -> None:
        """Take the losses of the samples.

        Args:
            losses: `(B,)`, the very tensor whose mean or sum the training step is about to differentiate.
            ungated: `(B,)`, the losses of the same samples without gates; makes `loss` and `mixed` more precise.

        Raises:
            InputError: not one loss per sample, a model that did not pass the gates, or no gradients where the
                estimator reads them.
        """
        if losses.shape != (len(self.gates),):
            raise InputError(
                f"losses of shape {tuple(losses.shape)} came for {len(self.gates)} samples: give one loss per sample, "
                "from a loss function that takes reduction='none'"
            )
        if not self.gated_modules:
            raise InputError(
                "the model did not run under the gates: call model.train(), and run the traced model itself, not a copy"
            )
        if self.gates.requires_grad and not losses.requires_grad:
            raise InputError(
                "the losses carry no gradients, and this estimator reads gate gradients: leave torch.no_grad(), or use "
                "the estimator 'loss' or 'source'"
            )
        self.losses = losses.detach()
        self.ungated = None if ungated is None else ungated.detach()
        self._has_gradients = losses.requires_grad
        if losses.requires_grad:
            # The loop may scale the loss, divide it for accumulation, or take a sum: whatever it does stands in the
            # gradient by these losses, and is divided out again.
            losses.register_hook(self._add_share)  # type: ignore[no-untyped-call]

    def _add_share(self, gradient: Tensor) -> None:
        self.share = gradient if self.share is None else self.share + gradient

    def gathered(self, ranks: Ranks) -> Observation:
        """Return the same of the batch of all ranks, `(size * B, ...)`, after their backward passes."""
        if ranks.size == 1:
            return self
        everyone = Observation(
            ranks.gathered(self.gates).requires_grad_(self.gates.requires_grad), ranks.gathered(self.draw)
        )
        everyone.losses, everyone.ungated, everyone.share, everyone.gates.grad = ranks.gathered(
            (self.losses, self.ungated, self.share, self.gates.grad)
        )
        everyone._has_gradients = self._has_gradients
        return everyone

    def gradients(self) -> Tensor:
        """Return the gradient of every sample's loss by its gates, `(B, N)`; up to a factor without losses.

        Where BatchNorm ties samples together, it is that of all losses by this sample's gates.

        Raises:
            InputError: there was no backward pass.
        """
        if self.awaits_backward or self.gates.grad is None:
            raise InputError("step() came before backward(): call loss.backward() first")
        if self.share is None:
            return self.gates.grad
        return self.gates.grad / self.share.to(self.gates.grad).unsqueeze(1)
