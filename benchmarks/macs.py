"""Our MACs, in closed form from the graph, beside fvcore's count of the running model, on the reference models.

python benchmarks/macs.py
"""

from __future__ import annotations

import torch
import torchvision
from results_file import write
from rich.progress import track

import compressor
from compressor.budget import CostModel
from compressor.deploy import fvcore_macs

MODELS = ("resnet18", "vgg16", "vgg16_bn", "mobilenet_v2", "densenet121", "googlenet")


def measure(name: str) -> dict[str, object]:
    """Count one model both ways, for one image of 224x224."""
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **extra).eval()
    x = torch.randn(1, 3, 224, 224)
    costs = CostModel(compressor.trace(model, x))
    ours, theirs = costs.dense["macs"], fvcore_macs(model, x)
    return {"model": name, "MACs": ours, "fvcore": theirs, "difference %": 100 * (ours / theirs - 1)}


if __name__ == "__main__":
    print(write("macs", [measure(name) for name in track(MODELS)], "Convolutions, Linear and matrix products."))
