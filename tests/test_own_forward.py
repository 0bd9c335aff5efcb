"""`prune(forward=...)`: networks that are run on batches of any kind, and tell their own losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from conftest import shake
from torch import Tensor, nn
from torch.nn import functional as F
from user_models import two_convolutions

import compressor
from compressor.errors import IdleArgumentError, InputError

HALF = compressor.Budget(0.4, "macs")


def small() -> nn.Module:
    torch.manual_seed(0)
    return shake(two_convolutions())


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 64, 3, 8, 8, generator=generator, dtype=torch.float64)
    return [(x, torch.arange(64) % 4) for x in images]


def mean_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


def each_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def named() -> list[dict[str, Any]]:
    return [{"image": x, "label": y, "path": "photo.png"} for x, y in batches()]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("criterion", ["relevance", "taylor"])
@pytest.mark.parametrize("forward", [mean_loss, each_loss])
def test_a_loss_by_forward_is_the_loss_by_loss_fn(criterion: str, forward: Any) -> None:
    one, other = small(), small()
    x = batches()[0][0][:1]
    how: dict[str, Any] = {"rounds": 3, "verify": True}
    compressor.prune(one, x, criterion, HALF, calibration=batches(), loss_fn=F.cross_entropy, **how)
    result = compressor.prune(other, x, criterion, HALF, calibration=named(), forward=forward, **how)
    assert result.reached
    assert state(one).keys() == state(other).keys()
    for name, tensor in state(one).items():
        torch.testing.assert_close(state(other)[name], tensor, atol=1e-9, rtol=1e-9)


def test_without_a_loss_it_runs_the_model() -> None:
    one, other = small(), small()
    x = batches()[0][0][:1]
    inputs = [x for x, _ in batches()]
    compressor.prune(one, x, "l1", HALF, calibration=inputs, verify=True)
    compressor.prune(
        other, x, "l1", HALF, calibration=named(), forward=lambda model, batch: model(batch["image"]), verify=True
    )
    assert all(torch.equal(state(other)[name], tensor) for name, tensor in state(one).items())


def test_what_forward_changes_of_modes_and_buffers_is_put_back() -> None:
    model = small()
    modes = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        modes.append(model.training)
        model.train()
        return mean_loss(model, batch)

    before = state(model)
    # Without compensation, which writes statistics too.
    how: dict[str, Any] = {"calibration": named(), "forward": forward, "compensate": "none"}
    result = compressor.prune(model, batches()[0][0][:1], "relevance", HALF, **how)
    assert result.reached
    assert not any(modes)
    assert not any(module.training for module in model.modules())
    kept = {row.item() for row in model.state_dict()["1.running_var"]}
    assert kept <= {row.item() for row in before["1.running_var"]}
    assert before["1.num_batches_tracked"] == model.state_dict()["1.num_batches_tracked"]


def test_a_detector_tells_its_losses_in_training_mode() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    images = list(torch.rand(2, 3, 320, 320))
    targets = [{"boxes": torch.tensor([[40.0, 40.0, 200.0, 200.0]]), "labels": torch.tensor([1])}] * 2
    before = state(model)
    training = model.training
    result = compressor.prune(
        model,
        ([images[0]],),
        "relevance",
        compressor.Budget(0.3),
        calibration=[(images, targets)],
        forward=lambda model, batch: sum(model.train()(*batch).values()),
        compensate="mean",
    )
    assert result.reached, result.blocked
    assert model.training is training
    after = state(model)
    counted = [name for name in after if name.endswith("num_batches_tracked")]
    assert counted
    assert all(torch.equal(after[name], before[name]) for name in counted)
    model.train()
    assert all(loss.isfinite() for loss in model(images, targets).values())


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"loss_fn": F.cross_entropy}, IdleArgumentError, "forward, which returns the loss itself"),
        ({"calibration": None}, InputError, r"pass calibration=\[batch, \.\.\.\]"),
        ({"forward": lambda model, batch: {"loss": model(batch["image"]).mean()}}, InputError, "returned a dict"),
        ({"forward": lambda model, batch: torch.zeros(())}, InputError, "carries no gradients"),
        ({"forward": lambda model, batch: model(batch["image"]).sum() * torch.nan}, InputError, "not finite"),
    ],
)
def test_what_cannot_be_used_is_refused(how: dict[str, Any], error: type[Exception], message: str) -> None:
    model = small()
    before = state(model)
    usual: dict[str, Any] = {"calibration": named(), "forward": mean_loss}
    with pytest.raises(error, match=message):
        compressor.prune(model, batches()[0][0][:1], "relevance", HALF, **(usual | how))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
