"""The `Pruner` in loops as others write them: accelerate, torchvision's references for detection and segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from launching import launched
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from user_models import two_convolutions

import compressor
from compressor._utils import count_samples
from compressor.integrations.wrapping import all_ranks, wrap_anew

HALF = compressor.Budget(0.4, "macs")


def accelerated(bare: nn.Module, precision: str = "no", batch: int = 16) -> dict[str, Tensor]:
    """Return the weights of a pruned training; every process takes batches of its own."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    dataset = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.05, momentum=0.9)
    model, wrapped, loader = accelerator.prepare(bare, optimizer, loader)
    epochs = 12
    pruner = compressor.Pruner(
        accelerator.unwrap_model(model), images[:1], budget=HALF, optimizer=optimizer, total_steps=2 * epochs,
        process_group=all_ranks(),
    )  # fmt: skip
    if isinstance(model, DistributedDataParallel):
        wrap_anew(model)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                with pruner.observe(x):
                    loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                wrapped.step()
                if accelerator.sync_gradients and pruner.step() and isinstance(model, DistributedDataParallel):
                    wrap_anew(model)
                wrapped.zero_grad()
    result = pruner.result()
    assert result.reached
    assert sum(tensor.numel() for tensor in bare.parameters()) == result.params[1] < result.params[0]
    return bare.state_dict()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    accelerated(two_convolutions(), precision)


def without_batchnorm() -> nn.Module:
    """Return a network without one: its statistics within a step are of a process's own images."""
    torch.manual_seed(0)
    model = two_convolutions()
    model[1] = nn.Identity()
    return model


def half_a_batch_each(folder: Path) -> dict[str, Tensor]:
    return accelerated(without_batchnorm(), batch=8)


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_two_processes_of_accelerate_come_to_what_one_comes_to(tmp_path: Path) -> None:
    for weights in launched(half_a_batch_each, tmp_path):
        torch.testing.assert_close(weights, accelerated(without_batchnorm()), rtol=1e-3, atol=1e-4)


def boxes_of(batch: int, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets as torchvision's detection references give them."""
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    return list(torch.rand(batch, 3, size, size)), [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * batch


def detector(name: str, **more: Any) -> nn.Module:
    make = getattr(torchvision.models.detection, name)
    return make(weights=None, weights_backbone=None, num_classes=3, **more)  # type: ignore[no-any-return]


def test_a_list_of_images_is_a_batch_of_its_length() -> None:
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 6)]
    assert count_samples((images,)) == count_samples(images) == 2
    assert count_samples((torch.zeros(5, 3, 8, 8), images)) == 5
    assert count_samples([torch.zeros(4, 2, 8, 8), torch.zeros(4, 2, 4, 4)]) == 4  # maps of features


@pytest.mark.parametrize(
    ("name", "criterion", "size"),
    [
        ("ssdlite320_mobilenet_v3_large", "l1", 320),
        pytest.param("fcos_resnet50_fpn", "relevance", 64, marks=pytest.mark.slow),
        pytest.param("fasterrcnn_mobilenet_v3_large_320_fpn", "relevance", 64, marks=pytest.mark.slow),
    ],
)
def test_the_detection_references(name: str, criterion: str, size: int) -> None:
    """`loss_dict = model(images, targets)`: a list of images, nested targets, a dict of losses."""
    model = detector(name, **({} if size == 320 else {"min_size": size, "max_size": size}))
    images, targets = boxes_of(2 if criterion == "l1" else 16, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    steps = 16 if criterion == "relevance" else 4
    pruner = compressor.Pruner(
        model,
        ([images[0]],),
        criterion,
        compressor.Budget(0.2, "params"),
        optimizer=optimizer,
        total_steps=steps,
        prune_every=steps,
        schedule=compressor.OneShot(0.9),
    )
    model.train()
    for _ in range(steps):
        with pruner.observe((images,)):
            losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    result = pruner.result()
    assert result.reached, result.blocked
    if criterion == "relevance" and "rcnn" in name:
        # Boxes of all images lie in one dimension there: nobody can say whose loss a gate would change.
        assert "a batch of 16 samples first" in str(result.notes)
    assert all(torch.isfinite(loss) for loss in model(images, targets).values())


@pytest.mark.filterwarnings("default")
def test_a_wrapper_that_is_made_again_stays_what_was_asked_for(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model, seen = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), []
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True, bucket_cap_mb=3)
        wrapped.register_forward_hook(lambda *_, **words: seen.append("ran"), with_kwargs=True)
        wrapped.register_comm_hook("mine", lambda state, bucket: seen.append(state) or allreduce_hook(None, bucket))
        wrapped.eval()
        compressor.cut(compressor.trace(model, torch.zeros(1, 4)), {"0": [0, 2, 5]})
        wrap_anew(wrapped)
        assert not wrapped.training
        assert not wrapped.broadcast_buffers
        assert wrapped.find_unused_parameters
        assert wrapped.bucket_bytes_cap == 3 * 2**20
        wrapped(torch.ones(1, 4)).sum().backward()
        assert seen == ["ran", "mine"]
        assert model[0].weight.grad.shape == (3, 4)
    finally:
        torch.distributed.destroy_process_group()
