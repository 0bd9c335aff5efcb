"""Quantisation-aware training: layers compute with weights and inputs as int8 has them, and learn to live with that.

    train(model, data, config, partial(QuantizationAware, weight_bits=8))

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
The model itself stays in floating point, without any module more: what is trained is then quantised as any other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from compressor.errors import InputError
from compressor.training.hooks import LossFunction

_AVERAGED = 0.01  # of the latest batch, in the moving range of a layer's inputs
_LARGEST_INPUT = 255
_LEAST_STEP = 1e-20  # of a channel without weights, instead of a division by zero
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class QuantizationAware:
    """A step hook whose loss is that of the model in int8: gradients pass the rounding by, as if there were none.

    Weights of convolutions and `nn.Linear` are rounded symmetrically, each output channel by its own largest; the
    inputs of these layers to 256 steps between the moving averages of their smallest and largest value. BatchNorm needs
    no folding: it scales whole output channels, and their steps along with them.

    Raises:
        InputError: the model has no such layer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int, *, weight_bits: int = 8) -> None:
        """Find the layers.

        Args:
            model: what is trained.
            optimizer, total_steps: as every hook gets them; of no use here.
            weight_bits: 8, or 7 where two products are summed in 16 bits; see `compressor.deploy.weight_bits`.
        """
        self._model = model
        self._largest = 2 ** (weight_bits - 1) - (weight_bits == 8)  # as onnxruntime has it: 127, but 64 of 7 bits
        # A weight that is made of others (weight_norm) is no parameter, and stays as it is.
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, _LAYERS) and layer._parameters.get("weight") is not None
        }
        if not self._layers:
            raise InputError(f"{type(model).__name__} has no convolution and no nn.Linear that int8 would change")
        self._ranges: dict[str, tuple[Tensor, Tensor]] = {}  # smallest and largest input so far, `(1,)` each

    def loss(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction) -> Tensor:
        """Run the model as int8 would, and return the mean loss."""
        weights = {f"{name}.weight": self._rounded(layer) for name, layer in self._layers.items()}
        hooks = [
            layer.register_forward_pre_hook(partial(self._round_input, name)) for name, layer in self._layers.items()
        ]
        try:
            return loss_fn(functional_call(self._model, weights, (inputs,), tie_weights=False), targets)
        finally:
            for hook in hooks:
                hook.remove()

    def _rounded(self, layer: nn.Module) -> Tensor:
        """Return the weight of a layer as int8 has it, `(D, C, ...)` or of a transposed convolution `(C, D, ...)`."""
        weight = layer._parameters["weight"]
        assert weight is not None
        channels = int(isinstance(layer, _TRANSPOSED))  # the dimension of the output channels
        others = [dim for dim in range(weight.dim()) if dim != channels]
        steps = weight.detach().abs().amax(others).clamp_min(_LEAST_STEP) / self._largest
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, steps, zeros, channels, -self._largest, self._largest)

    def _round_input(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what a layer is called with, its first argument rounded; writes the range that this one has had."""
        inputs, *rest = args
        whole = inputs.float()
        if name not in self._ranges:
            nothing = whole.new_full((1,), torch.inf)
            self._ranges[name] = (nothing, -nothing)
        on = torch.ones(1, dtype=torch.int64, device=whole.device)
        step, zero = whole.new_ones(1), torch.zeros(1, dtype=torch.int32, device=whole.device)
        rounded = torch.fused_moving_avg_obs_fake_quant(
            whole, on, on, *self._ranges[name], step, zero, _AVERAGED, 0, _LARGEST_INPUT, -1
        )
        return (rounded.to(inputs.dtype), *rest)

    def step(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return the range of every layer's inputs, by its name."""
        return {name: list(seen) for name, seen in self._ranges.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these ranges."""
        device = next(self._model.parameters()).device
        self._ranges = {name: (least.to(device), most.to(device)) for name, (least, most) in state.items()}
