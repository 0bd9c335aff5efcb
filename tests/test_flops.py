"""fvcore's count of multiply-adds, against counting by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.deploy.flops import fvcore_macs


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, image: Tensor, weight: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.first(image)).relu())
        return (self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)) @ weight).softmax(1)


MACS = 10 * 10 * 8 * 27 + 8 * 8 * 8 * 9 + 8 * 5 + 5 * 6


@pytest.mark.parametrize("size", [1, 4])
def test_products_are_counted_and_nothing_else(size: int) -> None:
    model, image, weight = Mixed(), torch.randn(size, 3, 10, 10), torch.randn(5, 6)
    assert fvcore_macs(model, (image, weight)) == size * MACS
    assert fvcore_macs(model, {"weight": weight, "image": image}) == size * MACS


def test_what_fvcore_has_no_count_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    fvcore_macs(nn.Sequential(nn.Conv2d(3, 2, 1), nn.GELU()), torch.zeros(1, 3, 4, 4))
    assert "fvcore has no count for aten::gelu" in caplog.text


def test_the_model_is_left_as_it_was(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = Mixed().train(), (torch.randn(2, 3, 10, 10), torch.randn(5, 6))
    mine = model.norm.register_forward_hook(lambda module, args, output: None)
    mean = model.norm.running_mean.clone()
    fvcore_macs(model, inputs)
    with pytest.raises(RuntimeError):
        fvcore_macs(model, (torch.randn(2, 4, 10, 10), inputs[1]))
    assert hooks_of(model) == [mine.id]
    assert all(module.training for module in model.modules())
    assert torch.equal(model.norm.running_mean, mean)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.startswith("fvcore")] == []


def hooks_of(model: nn.Module) -> list[Any]:
    return [key for module in model.modules() for key in (*module._forward_hooks, *module._forward_pre_hooks)]
