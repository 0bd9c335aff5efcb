"""Peers: our groups and scores against Torch-Pruning's, where it is right, and our MACs against fvcore's count."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

import compressor
from compressor.budget import CostModel
from compressor.criteria import Snapshot, from_torch_pruning, score
from compressor.deploy import fvcore_macs
from compressor.errors import InputError, ScoreError, UnknownNameError
from compressor.graph import Group

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


# -- their importances on our groups


IMPORTANCES = {
    "l2": lambda: tp.importance.GroupMagnitudeImportance(),
    "l1 of the largest layer": lambda: tp.importance.MagnitudeImportance(p=1, group_reduction="max", normalizer=None),
    "with biases": lambda: tp.importance.MagnitudeImportance(group_reduction="sum", normalizer="max", bias=True),
    "lamp": lambda: tp.importance.LAMPImportance(),
    "fpgm": lambda: tp.importance.FPGMImportance(),
    "batchnorm": lambda: tp.importance.BNScaleImportance(),
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "signed taylor": lambda: tp.importance.TaylorImportance(multivariable=True, normalizer=None),
}


def with_gradients(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with BatchNorms that differ from channel to channel, and gradients."""
    with torch.no_grad():
        for module in model.eval().modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    model(x).square().sum().backward()
    return model


def zoo(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=10)


def their_groups(model: nn.Module, x: Tensor) -> dict[str, tp.dependency.Group]:
    """By the layer whose output channels a group's scores are in order of."""
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    kinds = (*LAYERS, nn.ConvTranspose2d)
    groups = graph.get_all_groups(ignored_layers=[classifier], root_module_types=kinds)
    return {names[group[0].dep.target.module]: group for group in groups}


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2"])
def known(request) -> tuple[compressor.ChannelGraph, dict[str, tp.dependency.Group]]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = with_gradients(zoo(request.param), x)
    return compressor.trace(model, x), their_groups(model, x)


def group_of(graph: compressor.ChannelGraph, layer: str) -> tuple[Group, Tensor]:
    """Our group that a layer writes, and the layer's position of every channel."""
    wanted = (f"{layer}.weight", 0)
    ((group, member),) = [
        (group, each) for group in graph.groups for each in group.members if (each.tensor, each.dim) == wanted
    ]
    return group, member.positions.flatten()


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.filterwarnings("ignore")  # Torch-Pruning's own
def test_their_importances_give_our_groups_their_numbers(known, importance: str) -> None:
    graph, theirs = known
    make = IMPORTANCES[importance]
    found = score(from_torch_pruning(make()), graph.groups, Snapshot.from_model(graph.model))
    assert found.keys() == graph.sizes().keys()
    assert len(theirs) == len(found) > 7
    for layer, their_group in theirs.items():
        group, positions = group_of(graph, layer)
        wanted = make()(their_group).detach()[positions]
        torch.testing.assert_close(found[group.name], wanted, rtol=1e-4, atol=1e-7)


class Flattened(nn.Module):
    """A concatenation, a transposed convolution, and a Linear behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(10, 5, 2, 2)
        self.head = nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(torch.cat([self.a(x), self.b(x)], 1).relu()).relu().flatten(1))


@pytest.mark.parametrize("importance", ["l2", "taylor", "with biases"])
@pytest.mark.filterwarnings("ignore")
def test_offsets_transposed_kernels_and_flattened_channels_are_found(importance: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 2)
    model = with_gradients(Flattened(), x)
    graph, make = compressor.trace(model, x), IMPORTANCES[importance]
    found = score(from_torch_pruning(make()), graph.groups, Snapshot.from_model(model))
    wanted = {name: make()(group).detach() for name, group in their_groups(model, x).items()}
    assert {name: len(each) for name, each in found.items()} == {"a": 6, "b": 4, "up": 5}
    for name, scores in found.items():
        torch.testing.assert_close(scores, wanted[name], rtol=1e-5, atol=1e-7)


def test_a_channel_of_several_positions_gets_their_mean() -> None:
    model = nn.Conv2d(4, 6, 1, groups=2, bias=False)
    positions = torch.tensor([[0, 3], [1, 4], [2, 5]])  # one channel in each of two blocks
    group = Group("0", 3, (compressor.graph.group.Member("weight", 0, positions, "producer"),))
    importance = tp.importance.MagnitudeImportance(p=1, normalizer=None)
    snapshot = Snapshot(dict(model.named_parameters()), modules={"": model})
    rows = model.weight.detach().abs().flatten(1).sum(1)
    torch.testing.assert_close(from_torch_pruning(importance)(group, snapshot), rows.view(2, 3).mean(0))


@pytest.mark.filterwarnings("ignore")
def test_prune_takes_them_by_name_and_as_objects() -> None:
    widths = []
    x = torch.randn(2, 3, 32, 32)
    for criterion in ("tp:GroupTaylorImportance", from_torch_pruning(tp.importance.GroupTaylorImportance())):
        torch.manual_seed(0)
        model = with_gradients(zoo("resnet18"), x)
        result = compressor.prune(model, x, criterion=criterion, budget=0.3)
        assert result.reached
        widths.append(result.widths)
    assert widths[0] == widths[1]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "tp:GroupTailorImportance",
            UnknownNameError,
            "unknown criterion 'tp:GroupTailorImportance': did you mean 'tp:G",
        ),
        ("tp:", UnknownNameError, "unknown criterion 'tp:'"),
        ("tp:Importance", UnknownNameError, "unknown criterion 'tp:Importance'"),
        ("tp:GroupHessianImportance", InputError, "tp:GroupHessianImportance needs passes of its own over data before"),
        (
            "tp:GroupTaylorImportance",
            ScoreError,
            "GroupTaylorImportance failed: .*; run backward on some batches before",
        ),
        ("tp:BNScaleImportance", ScoreError, "BNScaleImportance looks at none of its layers; use another criterion"),
    ],
)
def test_an_importance_that_cannot_judge_says_why(name: str, error: type, message: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 3)
    with pytest.raises(error, match=message):
        compressor.prune(model, x, criterion=name)


def test_scores_that_are_not_finite_are_no_scores() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # their normalisation divides by the mean
    with pytest.raises(ScoreError, match="GroupTaylorImportance gave 8 scores, 0 of them finite; run backward"):
        compressor.prune(model, torch.randn(1, 3), criterion="tp:GroupTaylorImportance")


def test_a_snapshot_without_modules_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    (group,) = compressor.trace(model, torch.randn(1, 3)).groups
    with pytest.raises(InputError, match="MagnitudeImportance walks modules, and this snapshot shows none"):
        from_torch_pruning(tp.importance.MagnitudeImportance())(group, Snapshot(dict(model.named_parameters())))


# -- costs


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet"])
def test_fvcore_counts_the_same_macs(name: str) -> None:
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **extra).eval()
    x = torch.randn(1, 3, 64, 64)
    assert CostModel(compressor.trace(model, x)).dense["macs"] == fvcore_macs(model, x)
