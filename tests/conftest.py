"""What every test shares: one thread, a fixed seed, and small networks with non-trivial statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from compressor.graph import ChannelGraph

# These machines are shared: how long an example takes says nothing about the code.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


# Whole trainings, few of them in a file: begun last, they would keep one core busy while the others have nothing to do.
SLOW_FILES = (
    *("test_job", "test_grid", "test_ranks", "test_precision", "test_guide", "test_training", "test_ultralytics"),
    *("test_pages_in_browser", "test_onnxruntime_web", "test_transformers", "test_lightning", "test_layer_times"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files that take longest come first."""
    items.sort(key=lambda item: SLOW_FILES.index(item.path.stem) if item.path.stem in SLOW_FILES else len(SLOW_FILES))


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make BatchNorm statistics, scales and biases non-trivial, and the model double precision, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(noise + 0.5)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.2 * (noise - 0.5))
    return model


def masked(graph: ChannelGraph, keep: dict[str, Tensor]) -> nn.Module:
    """The oracle of every cut: a copy of the model in which consumers multiply the removed channels by zero."""
    model = copy.deepcopy(graph.model)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, kept in keep.items():
            group = graph[name]
            gone = [c for c in range(group.size) if c not in set(kept.tolist())]
            for member in group.of_role("consumer"):
                tensors[member.tensor].index_fill_(member.dim, member.positions[gone].flatten(), 0)
    return model


def random_keep(graph: ChannelGraph, share: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    """Keep a random share of every group, at least one channel."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, round(group.size * share))]
        for group in graph.groups
    }


def relative_error(first: Tensor, second: Tensor) -> float:
    """Largest difference over the largest value."""
    first, second = first.detach(), second.detach()
    return float((first - second).abs().max() / second.abs().max().clamp_min(1e-30))
