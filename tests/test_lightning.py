"""Networks are pruned by Lightning's real Trainer: checkpoints, resume, several optimizers, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from user_models import two_convolutions

import compressor
from compressor.errors import InputError

pl = pytest.importorskip("lightning.pytorch")
from compressor.integrations.lightning import PruningCallback  # noqa: E402

# Lightning's own warnings are not ours.
pytestmark = pytest.mark.filterwarnings("default")

HALF = compressor.Budget(0.5, "macs")
EXAMPLE = torch.zeros(1, 3, 16, 16)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = two_convolutions()
        self.losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Manual(Classifier):
    """Two optimizers, stepped by hand, of which one has the last layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        both = self.optimizers()
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in both:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.SGD(self.net[:5].parameters(), lr=0.05, momentum=0.9),
            torch.optim.AdamW(self.net[-1].parameters(), lr=0.01),
        )


def dataset(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label % 3, 4 * label :] += 1
    return TensorDataset(images, labels)


def loader(count: int = 128) -> DataLoader[Any]:
    return DataLoader(dataset(count), batch_size=16)


def trainer(folder: Path, callbacks: list[Any], **more: Any) -> Any:
    usual = {"max_epochs": 8, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return pl.Trainer(callbacks=callbacks, **(usual | quiet | more))


def hooks(module: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
    return [hook for each in module.modules() for kind in kinds for hook in getattr(each, kind).values()]


@pytest.mark.parametrize(
    ("module", "criterion", "more"),
    [
        (Classifier, "relevance", {}),
        (Classifier, "taylor", {"accumulate_grad_batches": 2}),
        (Classifier, "relevance", {"precision": "bf16-mixed", "gradient_clip_val": 1.0}),
        (Manual, "relevance", {"max_epochs": 4}),
    ],
)
def test_the_trainer_prunes(module: Any, criterion: str, more: dict[str, Any], tmp_path: Path) -> None:
    pl.seed_everything(0)
    wrapped = module()
    callback = PruningCallback(EXAMPLE, criterion, HALF, network=lambda module: module.net)
    trainer(tmp_path, [callback], **more).fit(wrapped, loader())
    result = callback.result()
    assert result.reached
    assert sum(tensor.numel() for tensor in wrapped.net.parameters()) == result.params[1] < result.params[0]
    assert not hooks(wrapped)
    compressor.save(wrapped.net, tmp_path / "small.safetensors")
    small = compressor.load(tmp_path / "small.safetensors", factory=two_convolutions)
    assert torch.equal(small(EXAMPLE), wrapped.net.eval()(EXAMPLE))


def test_the_module_itself_is_pruned_by_its_own_example(tmp_path: Path) -> None:
    module = Classifier()
    module.example_input_array = EXAMPLE
    callback = PruningCallback(criterion="l1", budget=HALF)
    trainer(tmp_path, [callback]).fit(module, loader())
    assert callback.result().reached
    assert module.net[0].out_channels < 16


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def callback() -> PruningCallback:
        return PruningCallback(EXAMPLE, "relevance", HALF, network=lambda module: module.net)

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 4:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    pl.seed_everything(0)
    whole, pruning = Classifier(), callback()
    trainer(tmp_path, [pruning, Stop()]).fit(whole, loader())
    module, again = Classifier(), callback()
    trainer(tmp_path, [again]).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.result() == pruning.result()
    assert again.result().reached
    assert module.losses == whole.losses[-len(module.losses) :]
    assert 0 < len(module.losses) < len(whole.losses)
    assert not hooks(module)


def test_the_best_checkpoint_is_the_best_since_the_last_cut(tmp_path: Path) -> None:
    best = pl.callbacks.ModelCheckpoint(tmp_path / "kept", monitor="accuracy", mode="max")
    stop = pl.callbacks.EarlyStopping("accuracy", mode="max", patience=2)
    callback = PruningCallback(EXAMPLE, "l1", HALF, network=lambda module: module.net)
    module = Classifier()
    trainer(tmp_path, [callback, best, stop], enable_checkpointing=True).fit(module, loader(), loader(32))
    assert callback.result().reached
    assert [str(path) for path in (tmp_path / "kept").iterdir()] == [best.best_model_path]
    stored = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({}, {}, "no example inputs: say PruningCallback"),
        ({"example_inputs": EXAMPLE}, {"max_epochs": -1}, "the training has no end: say Trainer"),
        ({"example_inputs": EXAMPLE, "rund_to": 4}, {}, "rund_to"),
    ],
)
def test_what_would_not_prune_is_refused(
    options: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    callback = PruningCallback(**options)
    with pytest.raises(InputError, match="nothing was pruned yet"):
        callback.result()
    with pytest.raises((InputError, TypeError), match=message):
        trainer(tmp_path, [callback], **more).fit(Classifier(), loader())


def test_several_devices_by_another_strategy_are_refused() -> None:
    class Two:
        world_size = 2

        class strategy:
            model = None

    with pytest.raises(InputError, match=r"2 devices train one model: say Trainer\(strategy=\"ddp\"\)"):
        PruningCallback(EXAMPLE).on_train_start(Two(), Classifier())


class Plain(Classifier):
    """Without BatchNorm, whose statistics within a step are of a process's own images."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.Identity()


def trained(folder: Path, images: DataLoader[Any], **devices: Any) -> dict[str, dict[str, Tensor]]:
    """Return the weights of a training, and of one that went on from its last checkpoint."""
    found = {}
    for criterion in ("l1", "relevance"):
        pl.seed_everything(0)
        module, callback = Plain(), PruningCallback(EXAMPLE, criterion, HALF, prune_every=16)
        keep = pl.callbacks.ModelCheckpoint(
            folder / criterion, every_n_train_steps=40, save_top_k=-1, filename="{step}"
        )
        trainer(folder, [callback, keep], max_epochs=8, enable_checkpointing=True, **devices).fit(module, images)
        assert callback.result().reached
        found[criterion] = module.net.state_dict()
    module, callback = Plain(), PruningCallback(EXAMPLE, criterion, HALF, prune_every=16)
    last = folder / criterion / "step=40.ckpt"
    trainer(folder, [callback], max_epochs=8, **devices).fit(module, images, ckpt_path=last)
    return found | {"gone on": module.net.state_dict()}


def half_a_batch_each(folder: Path) -> dict[str, dict[str, Tensor]]:
    rank = int(os.environ["RANK"])
    own = [first + place for first in range(8 * rank, 128, 16) for place in range(8)]
    images = DataLoader(Subset(dataset(128), own), batch_size=8)
    return trained(folder, images, strategy="ddp", devices=2, use_distributed_sampler=False)


@pytest.mark.slow
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", loader())
    first, second = launched(half_a_batch_each, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first["gone on"], first["relevance"], rtol=0, atol=0)
