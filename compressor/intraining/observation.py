"""One batch under the gates, from its forward pass to the statistics.

Shape letters: B samples; N channels of all groups, side by side; G groups; D dummies of each group.
"""

from __future__ import annotations

from torch import Tensor

from compressor.errors import InputError


class Observation:
    """One batch under the gates: who was drawn, and what came of it.

    Attributes:
        gates: `(B, N)`; their gradient is read after `backward()`.
        draw: `(B, N)` or `(B, N + D * G)` bool.
        losses: `(B,)`, detached, once they are credited.
        share: `(B,)`, the gradient of what `backward()` started from by every sample's loss: 1/B for a mean, times the
            factor of a gradient scaler, over the number of accumulated batches.
    """

    def __init__(self, gates: Tensor, draw: Tensor) -> None:
        self.gates, self.draw = gates, draw
        self.losses: Tensor | None = None
        self.share: Tensor | None = None
        self.reached: set[str] = set()

    def credit(self, losses: Tensor) -> None:
        """Take the losses of the samples.

        Args:
            losses: `(B,)`, the very tensor whose mean or sum the training step is about to differentiate.

        Raises:
            InputError: not one loss per sample, or a model that did not pass the gates.
        """
        if losses.shape != (len(self.gates),):
            raise InputError(
                f"losses of shape {tuple(losses.shape)} came for {len(self.gates)} samples: give one loss per sample, "
                "from a loss function that takes reduction='none'"
            )
        if not self.reached:
            raise InputError(
                "the model did not run under the gates: call model.train(), and run the traced model itself, not a copy"
            )
        self.losses = losses.detach()
        if losses.requires_grad:
            losses.register_hook(self._weigh)  # type: ignore[no-untyped-call]

    def _weigh(self, gradient: Tensor) -> None:
        self.share = gradient if self.share is None else self.share + gradient

    def gradients(self) -> Tensor:
        """Give the gradient of every sample's loss by its gates, `(B, N)`.

        Where BatchNorm ties samples together, it is that of all losses by this sample's gates.

        Raises:
            InputError: there was no backward pass.
        """
        if self.gates.grad is None or self.share is None:
            raise InputError("update() came before backward(): call loss.backward() first")
        return self.gates.grad / self.share.to(self.gates.grad).unsqueeze(1)
