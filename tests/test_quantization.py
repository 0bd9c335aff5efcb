"""Quantisation-aware training: what it computes is what the int8 file computes, and a model learns to live with it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.deploy import export_onnx, lower_precision, open_session, weight_bits
from compressor.errors import InputError
from compressor.training import QuantizationAware

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2),
        nn.Flatten(),
        nn.Linear(6 * 81, 5),
    )
    with torch.no_grad():  # channels of different sizes: one step for all of them would show
        model[0].weight.mul_(torch.logspace(-2, 1, 8).view(-1, 1, 1, 1))
        model[1].running_var.mul_(torch.logspace(-4, 2, 8))
    return model.eval()


def in_int8(model: nn.Module, inputs: Tensor, hook: QuantizationAware | None = None, bits: int = 8) -> Tensor:
    """Return the model's outputs as the hook sees them, by a loss that keeps them."""
    hook = hook or QuantizationAware(model, None, 0, weight_bits=bits)
    seen: list[Tensor] = []
    hook.loss(inputs, torch.zeros(len(inputs)), lambda outputs, _: seen.append(outputs) or outputs.sum())
    return seen[0].detach()


def test_what_is_trained_is_what_the_int8_file_computes(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():  # one large weight in each channel leaves few steps to the others
        model[0].weight[:, 0, 0, 0] *= 30
        model[7].weight[:, 0] *= 30
    whole = export_onnx(model, tmp_path / "whole.onnx", IMAGES[:2]).path
    expected = model(IMAGES).detach().numpy()
    check = [(IMAGES.numpy(), expected.argmax(1))]
    made = lower_precision(
        whole, tmp_path / "small.onnx", "int8", check=check, calibration=[IMAGES.numpy()], tolerance=0.9
    )
    of_file = open_session(made.path).run(None, {open_session(made.path).get_inputs()[0].name: IMAGES.numpy()})[0]
    ours = in_int8(model, IMAGES, bits=weight_bits()).numpy()
    # The file also rounds what layers return, so that it is not the very same; the coarse weights are most of it.
    moved = [(outputs - expected).ravel() for outputs in (of_file, ours)]
    assert np.corrcoef(moved)[0, 1] > 0.9


def test_a_linear_layer_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.27, 0.302], [-12.7, 0.04]])  # steps of 0.01 and 0.1
    inputs = torch.tensor([[0.0, 2.55], [1.004, 0.0]])  # steps of 0.01
    rounded = torch.tensor([[1.27, 0.30], [-12.7, 0.0]])
    torch.testing.assert_close(in_int8(layer, inputs), torch.tensor([[0.0, 2.55], [1.0, 0.0]]) @ rounded.T)
    layer.weight.grad = None
    QuantizationAware(layer, None, 0).loss(inputs, None, lambda outputs, _: outputs.sum()).backward()
    # The gradient by a rounded weight is that by the weight: the sum of the inputs, as they were rounded.
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[1.0, 2.55]]).expand(2, 2))


def test_seven_bits_have_steps_twice_as_wide() -> None:
    layer = nn.Linear(1000, 1, bias=False)
    inputs = torch.eye(1000)  # its outputs are the weights
    errors = [
        (in_int8(layer, inputs, bits=bits).flatten() - layer.weight.detach().flatten()).abs().max() for bits in (8, 7)
    ]
    assert errors[1] / errors[0] == pytest.approx(2, rel=0.05)


def test_the_model_stays_in_floating_point() -> None:
    model = network().train()
    before = copy.deepcopy(model)
    in_int8(model, IMAGES)
    before(IMAGES)
    assert list(model.state_dict()) == list(before.state_dict())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert model[1].num_batches_tracked == 1  # BatchNorm looks at the batch as ever
    model.eval(), before.eval()
    torch.testing.assert_close(model(IMAGES), before(IMAGES), rtol=0.05, atol=0.05)  # but for BatchNorm's statistics


def test_ranges_move_slowly_and_go_on_from_a_checkpoint() -> None:
    model = network()
    hook = QuantizationAware(model, None, 0)
    in_int8(model, IMAGES, hook)
    in_int8(model, 3 * IMAGES, hook)
    least, most = hook.state_dict()["0"]
    assert most.item() == pytest.approx(IMAGES.max().item() * (0.99 + 0.01 * 3), rel=1e-4)
    assert least.item() == pytest.approx(IMAGES.min().item() * (0.99 + 0.01 * 3), rel=1e-4)
    other = QuantizationAware(model, None, 0)
    other.load_state_dict(copy.deepcopy(hook.state_dict()))
    assert torch.equal(in_int8(model, IMAGES, other), in_int8(model, IMAGES, hook))


def test_a_model_learns_to_live_with_coarse_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 10, generator=generator)
    targets = (inputs @ torch.randn(10, 3, generator=generator)).argmax(1)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    losses = {}
    for aware in (False, True):
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        hook = QuantizationAware(model, optimizer, 300, weight_bits=2)
        for _ in range(300):
            loss = hook.loss(inputs, targets, F.cross_entropy) if aware else F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[aware] = hook.loss(inputs, targets, F.cross_entropy).item()
    assert losses[True] < 0.5 * losses[False]


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"no convolution and no nn\.Linear"):
        QuantizationAware(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), None, 0)


def test_layers_that_share_a_weight_are_rounded_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 4))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = QuantizationAware(model, optimizer, 10).loss(torch.randn(8, 3, 8, 8), torch.arange(8) % 4, F.cross_entropy)
    loss.backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert model[2].weight is model[0].weight
