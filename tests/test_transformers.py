"""Networks are pruned by the real Trainer of Hugging Face: checkpoints, resume, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launched
from torch import Tensor, nn
from torch.utils.data import Dataset

import compressor
from compressor.errors import InputError

transformers = pytest.importorskip("transformers")
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, ViTConfig, ViTForImageClassification  # noqa: E402  # noqa: E402

from compressor.integrations.transformers import PruningCallback  # noqa: E402

# transformers' own warnings are not ours.
pytestmark = pytest.mark.filterwarnings("default")

HALF = compressor.Budget(0.5, "macs")
EXAMPLE = {"pixel_values": torch.zeros(1, 3, 32, 32)}


class Squares(Dataset[dict[str, Tensor]]):
    """Noise, brighter in one of four quarters, which is the class."""

    def __init__(self, count: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 32, 32, generator=generator)
        self.labels = torch.arange(count) % 4
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            image[:, 16 * (label // 2) :, 16 * (label % 2) :][:, :16, :16] += 2

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=4)
    )


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=4,
        )
    )


def trainer(model: nn.Module, folder: Path, callbacks: list[Any], *, evaluate: Any = None, **more: Any) -> Trainer:
    usual = {"num_train_epochs": 8, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "save_strategy": "no"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(str(folder), **(usual | quiet | more))
    return Trainer(model, arguments, train_dataset=Squares(), eval_dataset=evaluate, callbacks=callbacks)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(Squares().images[:32]).logits


@pytest.mark.parametrize(
    ("make", "criterion", "more"),
    [
        (resnet, "relevance", {}),
        (resnet, "taylor", {"gradient_accumulation_steps": 2}),
        (vit, "relevance", {}),
        (vit, "l1", {"bf16": True}),
    ],
)
def test_the_trainer_prunes(make: Any, criterion: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    before = shapes(model)
    callback = PruningCallback(EXAMPLE, criterion, HALF)
    loop = trainer(model, tmp_path, [callback], **more)
    loop.train()
    result = callback.result()
    assert result.reached
    assert shapes(model) != before
    assert sum(tensor.numel() for tensor in model.parameters()) == result.params[1]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model = loop.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # out of autocast
    right = (outputs(model).argmax(1) == Squares().labels[:32]).float().mean()
    assert right >= 0.5  # chance is a quarter
    compressor.save(model, tmp_path / "small.safetensors")
    assert torch.equal(outputs(compressor.load(tmp_path / "small.safetensors", factory=make)), outputs(model))


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 16, "seed": 3}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return resnet()

    whole = PruningCallback(EXAMPLE, "relevance", HALF)
    model = build()
    trainer(model, tmp_path / "whole", [whole], **how).train()

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 40

    trainer(build(), tmp_path / "cut", [PruningCallback(EXAMPLE, "relevance", HALF), Stop()], **how).train()
    checkpoint = tmp_path / "cut" / "checkpoint-32"
    narrow = compressor.load(checkpoint / "pruned.safetensors", factory=build)
    again = PruningCallback(EXAMPLE, "relevance", HALF)
    trainer(narrow, tmp_path / "cut", [again], **how).train(resume_from_checkpoint=str(checkpoint))
    assert again.result() == whole.result()
    assert again.result().reached
    assert torch.equal(outputs(narrow), outputs(model))


def test_the_best_model_is_the_best_since_the_last_cut(tmp_path: Path) -> None:
    how = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    callback = PruningCallback(EXAMPLE, "l1", HALF)
    model = resnet()
    loop = trainer(model, tmp_path, [callback], evaluate=Squares(32), **how)
    loop.train()
    assert sum(tensor.numel() for tensor in model.parameters()) == callback.result().params[1]
    best = Path(loop.state.best_model_checkpoint)
    assert torch.equal(outputs(compressor.load(best / "pruned.safetensors", factory=resnet)), outputs(model))


def test_a_wide_model_does_not_go_on_where_a_narrow_one_stopped(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 40}
    model = resnet()
    trainer(model, tmp_path, [PruningCallback(EXAMPLE, "l1", HALF)], **how).train()
    state = torch.load(tmp_path / "checkpoint-40" / "pruner.pt", weights_only=True)
    wide = resnet()
    pruner = compressor.Pruner(
        wide, EXAMPLE, "l1", HALF, optimizer=torch.optim.SGD(wide.parameters(), lr=0.1), total_steps=64
    )
    with pytest.raises(InputError, match=r"has \d+ channels, \d+ in the state .* load the pruned model"):
        pruner.load_state_dict(state)


def test_a_training_that_pruned_nothing_is_not_gone_on_with(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 8}
    model = resnet()
    trainer(model, tmp_path, [], num_train_epochs=1, **how).train()
    with pytest.raises(InputError, match=r"checkpoint-8.pruner\.pt is not there"):
        trainer(model, tmp_path, [PruningCallback(EXAMPLE)], **how).train(resume_from_checkpoint=True)


def test_a_training_that_ended_in_an_error_leaves_no_hooks_to_the_next(tmp_path: Path) -> None:
    class Fail(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise RuntimeError("no more")

    callback, model = PruningCallback(EXAMPLE, "l1", HALF), resnet()
    with pytest.raises(RuntimeError, match="no more"):
        trainer(model, tmp_path, [callback, Fail()]).train()
    trainer(model, tmp_path, [callback], num_train_epochs=2).train()
    assert callback.result().reached
    assert not model._forward_hooks


def test_what_would_not_prune_is_refused(tmp_path: Path) -> None:
    callback = PruningCallback(EXAMPLE)
    with pytest.raises(InputError, match="nothing was pruned yet"):
        callback.result()
    with pytest.raises(InputError, match="torch_compile=True"):
        trainer(resnet(), tmp_path, [callback], torch_compile=True).train()
    loop = trainer(resnet(), tmp_path, [callback])
    loop.args._n_gpu = 2
    loop.args.use_cpu = False
    with pytest.raises(InputError, match=r"one process trains on 2 devices: start one for each \(torchrun"):
        callback.on_train_begin(loop.args, loop.state, loop.control, model=loop.model, optimizer=None)


def trained(folder: Path, batch: int) -> dict[str, dict[str, Tensor]]:
    """Return the weights of a training, and of one that went on from its last checkpoint."""
    found = {}
    for criterion in ("l1", "relevance"):
        torch.manual_seed(0)
        model, place = vit(), folder / criterion
        usual = {"per_device_train_batch_size": batch, "optim": "sgd", "learning_rate": 0.05}
        callback = PruningCallback(EXAMPLE, criterion, HALF, prune_every=16)
        trainer(model, place, [callback], save_strategy="steps", save_steps=40, **usual).train()
        assert callback.result().reached
        found[criterion] = model.state_dict()
    model = compressor.load(place / "checkpoint-40" / "pruned.safetensors", factory=vit)
    callback = PruningCallback(EXAMPLE, criterion, HALF, prune_every=16)
    loop = trainer(model, place, [callback], **usual)
    loop.train(resume_from_checkpoint=str(place / "checkpoint-40"))
    return found | {"gone on": model.state_dict()}


def half_a_batch_each(folder: Path) -> dict[str, dict[str, Tensor]]:
    return trained(folder, 8)


@pytest.mark.slow
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", 16)
    first, second = launched(half_a_batch_each, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first["gone on"], first["relevance"], rtol=0, atol=0)
