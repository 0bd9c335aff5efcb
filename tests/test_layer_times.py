"""Where the time goes: layers found again in onnxruntime's profile, and what is said of those that stayed slow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from sample_report import sample
from torch import Tensor, nn
from torchvision.models import get_model

import compressor
from compressor.deploy import REST, layer_times, onnx_layers
from compressor.report import html
from compressor.report.document import LayerTime
from compressor.report.layer_rows import SHOWN, layer_rows, remark
from compressor.report.markdown import markdown
from compressor.report.throughput_picture import throughput


def exported(model: nn.Module, path: Path, size: int = 64) -> Path:
    return compressor.export_onnx(model.eval(), path, torch.randn(2, 3, size, size)).path


class Residual(nn.Module):
    """Two convolutions flow into one sum, with a convolution before and a layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.right = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((self.left(x) + self.right(x)).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("mobilenet_v3_small", "resnet18", "mobilenet_v2", "shufflenet_v2_x0_5")
        ),
    ],
)
def test_every_layer_is_found_in_the_profile(tmp_path: Path, name: str) -> None:
    model = get_model(name, num_classes=10)
    path = exported(model, tmp_path / "model.onnx")
    times = layer_times({"it": path}, torch.zeros(1, 3, 64, 64), runs=3)["it"]
    layers = {key for key, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert times.keys() - {REST} == layers
    assert all(value > 0 for value in times.values())


def test_layers_that_flow_into_one_sum(tmp_path: Path) -> None:
    path = exported(Residual(), tmp_path / "model.onnx", size=128)
    times = layer_times({"a": path, "b": path}, torch.zeros(1, 3, 128, 128), runs=5)
    assert list(times) == ["a", "b"]
    assert list(times["a"]) == ["stem", "left", "right", "fc", REST]
    assert times["a"]["left"] > times["a"]["right"] > times["a"]["fc"] > 0  # 9 times the work, and no work
    assert {each.name: each.shape for each in onnx_layers(path)}["left"] == (16, 16, 3, 3)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (LayerTime("lost nothing", 2.0, 2.0, (64, 64, 3, 3), (64, 64, 3, 3)), ""),
        (LayerTime("as promised", 2.0, 0.6, (64, 64, 3, 3), (32, 32, 3, 3)), ""),
        (LayerTime("odd", 2.0, 1.9, (64, 64, 3, 3), (33, 40, 3, 3)), "33 output channels are no multiple of 8 (32 is)"),
        (LayerTime("odd", 2.0, 1.9, (64, 64, 3, 3), (32, 3, 3, 3)), "3 input channels are no multiple of 8 (8 is)"),
        (LayerTime("thin", 0.02, 0.019, (64, 64, 1, 1), (32, 32, 1, 1)), "so short that the call itself"),
        (LayerTime("depthwise", 2.0, 1.9, (64, 1, 3, 3), (33, 1, 3, 3)), "depthwise: memory"),
        (LayerTime("linear", 2.0, 1.9, (100, 64), (51, 37)), "not by its widths"),
        (LayerTime("no time", 0.0, 0.0, (64, 64, 3, 3), (32, 32, 3, 3)), ""),
    ],
)  # fmt: skip
def test_why_a_layer_stayed_slow(layer: LayerTime, says: str) -> None:
    assert remark(layer).startswith(says)
    assert bool(remark(layer)) == bool(says)


def test_rows_are_complete() -> None:
    layers = [LayerTime(f"l{n}", n + 1.0, 1.0, (8, 8, 3, 3), (8, 4, 3, 3)) for n in range(SHOWN + 3)]
    rows = layer_rows([*layers, LayerTime("", 0.5, 0.25)])
    assert [row[0] for row in rows] == [f"l{n}" for n in range(SHOWN + 2, 2, -1)] + ["everything else"]
    assert rows[-1][1:4] == ("6.50", "3.25", "2.00×")  # 1 + 2 + 3 + 0.5 of the dense model
    assert rows[0][4] == "2.00×"
    assert layer_rows(()) == []


def test_the_report_shows_them() -> None:
    report = sample()
    for page in (markdown(report), html(report)):
        assert "13 output channels are no multiple of 8 (16 is)" in page
    assert "throughput over batch size" in html(report)
    without = dataclasses.replace(report, layer_times=(), timings=report.timings[:2])
    assert "## Layers" not in markdown(without)
    assert "Where the time goes" not in html(without)
    assert throughput(without.timings) == ""  # one batch size shows no course


def test_images_a_second() -> None:
    drawn = throughput(sample().timings)
    assert "torch, dense: 667 images a second, 8 at once" in drawn  # 12 ms for 8
    assert "torch, pruned: 2.00 k images a second, 8 at once" in drawn
