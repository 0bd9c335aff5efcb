"""Peers: our groups against Torch-Pruning's, where it is right, and our MACs against fvcore's count."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

import compressor
from compressor.costs import CostModel
from compressor.flops import fvcore_macs

LAYERS = (nn.Conv2d, nn.Linear)


def ours(model: nn.Module, x: Tensor) -> set[frozenset[str]]:
    """Per group, the layers whose output channels it cuts."""
    layers = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    found = set()
    for group in compressor.trace(model, x).groups:
        cut = {member.tensor.rpartition(".")[0] for member in group.members if member.dim == 0}
        found.add(frozenset(cut & layers))
    return found


def theirs(model: nn.Module, x: Tensor) -> set[frozenset[str]]:
    """The same, by Torch-Pruning; the classifier, whose outputs are the model's, left out."""
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    found = set()
    for group in graph.get_all_groups(ignored_layers=[classifier], root_module_types=LAYERS):
        layers = [each.dep.target.module for each in group if graph.is_out_channel_pruning_fn(each.dep.handler)]
        found.add(frozenset(names[layer] for layer in layers if isinstance(layer, LAYERS)))
    return found


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121", "regnet_x_400mf", "efficientnet_b0"]
)
@pytest.mark.filterwarnings("ignore")  # Torch-Pruning's own
def test_the_same_layers_are_cut_together(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    assert ours(model, x) == theirs(model, x)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet"])
def test_fvcore_counts_the_same_macs(name: str) -> None:
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **extra).eval()
    x = torch.randn(1, 3, 64, 64)
    assert CostModel(compressor.trace(model, x)).dense["macs"] == fvcore_macs(model, x)
