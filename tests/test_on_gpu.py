"""The promises on a GPU: the same cuts as on a CPU, exact, in mixed precision, and after an interruption."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models
from user_models import tiny

import compressor
from compressor import job
from compressor._utils import StopRequest
from compressor.criteria import CRITERIA, needs_gradients
from compressor.deploy import export_onnx, torch_runner
from compressor.training import Data, History, TrainingConfig, load_data, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IN_TRAINING = ("relevance", "l1", "euclidean", "random", "taylor")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits", image_size=16)


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("make", [models.resnet18, models.mobilenet_v2, models.vit_b_16])
def test_a_cut_is_exact_and_the_same_as_on_a_cpu(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    here = make(num_classes=10).eval().double()
    there = copy.deepcopy(here).cuda()
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    compressor.prune(here, x, "l1", compressor.Budget(0.3, "macs"), compensate="none", verify=True)
    compressor.prune(there, x.cuda(), "l1", compressor.Budget(0.3, "macs"), compensate="none", verify=True)
    assert widths(here) == widths(there)
    torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("criterion", IN_TRAINING)
@pytest.mark.parametrize("amp", [False, True])
def test_every_criterion_prunes_in_training(criterion: str, amp: bool, digits: Data) -> None:
    torch.manual_seed(0)
    model = tiny(10)
    before = sum(parameter.numel() for parameter in model.parameters())
    config = TrainingConfig(2, 64, device="cuda", amp=amp, channels_last=amp)
    example = torch.zeros(1, *digits.image_shape, device="cuda")

    def hook(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> compressor.Pruner:
        return compressor.Pruner(
            model, example, criterion, 0.5, optimizer=optimizer, total_steps=total_steps, round_to=1, prune_every=5
        )

    history = train(model, digits, config, hook)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert after < 0.55 * before
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert history.epochs[-1]["validation_accuracy"] > 0.15


def test_a_compensated_cut_is_that_of_a_cpu() -> None:
    torch.manual_seed(0)
    here = tiny(10).double()
    there = copy.deepcopy(here).cuda()
    x, y = torch.randn(32, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (32,))
    for model, device in ((here, "cpu"), (there, "cuda")):
        pairs = [(x.to(device), y.to(device))]
        compressor.prune(
            # By relevance other channels may go: a GPU draws the subsets with a generator of its own.
            model, x[:1].to(device), "taylor", compressor.Budget(0.5, "macs"), calibration=pairs,
            loss_fn=F.cross_entropy, compensate="linear", rounds=2, round_to=1,
        )  # fmt: skip
    assert widths(here) == widths(there)
    torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=1e-6, atol=1e-6)


def test_an_interrupted_training_goes_on(digits: Data, tmp_path: Path) -> None:
    config = TrainingConfig(2, 64, lr=0.01, device="cuda", amp=True, augment=False)
    stop = StopRequest()

    def on_progress(step: int, total: int) -> None:
        if step == total // 2 + 3:
            stop.signal = signal.SIGINT

    def trained(folder: str, **how: Any) -> History:
        torch.manual_seed(0)
        return train(tiny(10), digits, config, checkpoint=tmp_path / folder, **how)

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("cut off", on_progress=on_progress, stop=stop)
    resumed = trained("cut off", resume=True)
    # A GPU adds up in another order each time: nearly the same, not bit for bit.
    assert [each["train_loss"] for each in resumed.epochs] == pytest.approx(
        [each["train_loss"] for each in whole.epochs], rel=0.02
    )


def test_what_is_on_a_gpu_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny(10).eval().cuda()
    made = export_onnx(model, tmp_path / "model.onnx", torch.zeros(2, 3, 16, 16, device="cuda"))
    assert made.path.is_file()


def test_a_run_without_a_training_works_there(tmp_path: Path) -> None:
    options = {"model": "user_models:tiny", "epochs": 0, "finetune-epochs": 0, "criterion": "l1", "when": "after"}
    made = job.run(job.Settings.from_options({**options, "device": "cuda", "out": str(tmp_path)}), timings=False)
    assert made.goal.met


def test_a_cuda_graph_keeps_what_its_kernels_read() -> None:
    model = tiny(10).eval().cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    run = torch_runner(copy.deepcopy(model), x, as_graph=True)
    torch.cuda.empty_cache()
    filled = torch.full((1 << 24,), float("nan"), device="cuda")  # where freed weights would have been
    call = run()
    assert filled.isnan().all()
    torch.testing.assert_close(call(), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if not name.startswith("tp:")])
def test_every_criterion_scores_on_a_gpu(criterion: str) -> None:
    torch.manual_seed(0)
    model = tiny(10).cuda()
    x = torch.randn(16, 3, 16, 16, device="cuda")
    pairs = [(x, torch.randint(0, 10, (16,), device="cuda"))]
    losses = needs_gradients(criterion) or criterion == "relevance"
    how: dict[str, Any] = {"calibration": pairs, "loss_fn": F.cross_entropy} if losses else {"calibration": [x]}
    found = compressor.prune(model, x[:1], criterion, compressor.Budget(0.3, "macs"), round_to=1, **how)
    assert found.macs[1] < found.macs[0]
