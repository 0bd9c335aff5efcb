"""YOLO networks are pruned by the real trainer of Ultralytics, on drawn shapes: checkpoints, resume, refusals."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from conftest import relative_error
from shapes import write_yolo_dataset
from torch import Tensor, nn

import compressor

# Its settings are read from the user's folder when it is imported.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ.setdefault("YOLO_OFFLINE", "true")
YOLO = pytest.importorskip("ultralytics").YOLO
from ultralytics.nn.tasks import DetectionModel, yaml_model_load  # noqa: E402

from compressor.errors import InputError, TrainingError  # noqa: E402
from compressor.integrations.ultralytics import export_onnx, prune_while_training, train_pruned  # noqa: E402

# Ultralytics' own warnings are not ours.
pytestmark = pytest.mark.filterwarnings("default")

HALF = compressor.Budget(0.5, "macs")
EPOCHS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_yolo_dataset(tmp_path_factory.mktemp("shapes") / "set", {"train": 48, "val": 16}, 64)


def yolo(name: str, folder: Path) -> Any:
    """A YOLO of half the width of its smallest, quick to train."""
    config = yaml_model_load(f"{name}.yaml")
    file = folder / f"{name}.yaml"  # JSON is YAML
    file.write_text(json.dumps(config | {"scales": {"n": [0.33, 0.125, 512]}, "scale": "n"}))
    return YOLO(str(file))


def arguments(data: Path, folder: Path, **more: Any) -> dict[str, Any]:
    usual = {"epochs": EPOCHS, "imgsz": 64, "batch": 8, "device": "cpu", "name": "run", "exist_ok": True, "seed": 0}
    quiet = {"plots": False, "verbose": False, "workers": 0}
    return {"data": str(data), "project": str(folder)} | usual | quiet | more


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def cuts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "cuts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "criterion", "optimizer"),
    [
        ("yolov8n", "relevance", "auto"),
        pytest.param("yolo11n", "l1", "SGD", marks=pytest.mark.slow),
        pytest.param("yolo26n", "taylor", "MuSGD", marks=pytest.mark.slow),
    ],
)
def test_the_trainer_writes_the_small_network(
    name: str, criterion: str, optimizer: str, data: Path, tmp_path: Path
) -> None:
    network = yolo(name, tmp_path)
    before = shapes(network.model)
    # Relevance needs some time to tell channels from chance.
    few = {} if criterion == "relevance" else {"epochs": 3}
    period = {} if criterion == "relevance" else {"prune_every": 4}
    result = prune_while_training(
        network, criterion, HALF, pruner=period, **arguments(data, tmp_path, optimizer=optimizer, **few)
    )
    assert result.reached
    assert result.macs[1] <= 0.5 * result.macs[0]
    for file in ("best.pt", "last.pt"):
        stored = YOLO(str(tmp_path / "run" / "weights" / file))
        assert shapes(stored.model) == shapes(network.model) != before
    assert sum(tensor.numel() for tensor in network.model.parameters()) == result.params[1]
    assert not any("compressor" in attribute for attribute in vars(network.model))
    events = cuts(tmp_path)
    assert len(events) == len({event["step"] for event in events}) > 0
    assert all(("observed" in event) is (criterion == "relevance") for event in events)
    network.val(data=str(data), imgsz=64, device="cpu", plots=False, verbose=False)
    images = torch.rand(3, 3, 64, 64)
    expected = network.predict(images, imgsz=64, device="cpu", verbose=False, conf=0.0)
    head = dict(vars(network.model.model[-1]))
    report = export_onnx(network, tmp_path / "small.onnx", check_inputs=images)
    assert report.images >= 7 + 3
    assert vars(network.model.model[-1]).keys() == head.keys()
    again = network.predict(images, imgsz=64, device="cpu", verbose=False, conf=0.0)
    assert all(torch.equal(one.boxes.data, other.boxes.data) for one, other in zip(expected, again, strict=True))
    from_file = YOLO(str(tmp_path / "small.onnx"), task="detect")
    found = from_file.predict(images[:1], imgsz=64, device="cpu", verbose=False, conf=0.0)
    assert found[0].boxes.conf.max() == pytest.approx(expected[0].boxes.conf.max().item(), abs=1e-3)


@pytest.fixture(scope="module")
def interrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that ended after its third epoch, in the middle of the schedule."""
    folder = tmp_path_factory.mktemp("interrupted")
    network = yolo("yolov8n", folder)

    def stop(trainer: Any) -> None:
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    network.add_callback("on_fit_epoch_end", stop)
    before = {event: list(each) for event, each in network.callbacks.items()}
    with pytest.raises(KeyboardInterrupt):
        prune_while_training(network, "l1", HALF, pruner={"prune_every": 2}, **arguments(data, folder))
    assert network.callbacks == before
    return folder


def test_an_interrupted_training_goes_on(interrupted: Path, data: Path) -> None:
    done = cuts(interrupted)
    network = YOLO(str(interrupted / "run" / "weights" / "last.pt"))
    assert shapes(network.model) != shapes(yolo("yolov8n", interrupted).model)
    result = prune_while_training(
        network, "l1", HALF, pruner={"prune_every": 2}, **arguments(data, interrupted, resume=True)
    )
    events = cuts(interrupted)
    assert events[: len(done)] == done
    steps = [event["step"] for event in events]
    assert steps == sorted(set(steps))
    assert max(event["step"] for event in done) <= 18 < steps[-1]  # six batches an epoch
    assert result.reached
    assert sum(tensor.numel() for tensor in network.model.parameters()) == result.params[1] < result.params[0]
    widths: dict[str, int] = {}
    for event in events:  # every cut began with the widths that the one before left
        for group, (wide, narrow) in event["widths"].items():
            assert widths.get(group, wide) == wide
            widths[group] = narrow


def test_a_training_that_pruned_nothing_is_not_gone_on_with(data: Path, tmp_path: Path) -> None:
    network = yolo("yolov8n", tmp_path)

    def stop(trainer: Any) -> None:
        raise KeyboardInterrupt

    network.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        network.train(**arguments(data, tmp_path))
    network = YOLO(str(tmp_path / "run" / "weights" / "last.pt"))
    with pytest.raises(InputError, match="nothing was pruned in that training"):
        prune_while_training(network, "l1", HALF, **arguments(data, tmp_path, resume=True))


def test_the_average_follows_the_network_after_a_cut(data: Path, tmp_path: Path) -> None:
    network = yolo("yolov8n", tmp_path)
    compared: list[int] = []

    def without_memory(trainer: Any) -> None:
        trainer.ema.decay = lambda updates: 0.0

    def compare(trainer: Any) -> None:
        average = trainer.ema.ema.state_dict()
        for name, tensor in trainer.model.state_dict().items():
            assert not tensor.is_floating_point() or torch.equal(average[name], tensor)
        compared.append(sum(tensor.numel() for tensor in average.values()))

    network.add_callback("on_train_start", without_memory)
    network.add_callback("on_train_epoch_end", compare)
    # A batch an optimizer step, and no cut in the last step of an epoch: compensation changes what the average has not.
    few = arguments(data, tmp_path, epochs=4, nbs=8)
    prune_while_training(network, "l1", HALF, pruner={"prune_every": 5}, **few)
    assert compared == sorted(compared, reverse=True)
    assert compared[0] > compared[-1]


def test_a_pruned_network_is_trained_on(data: Path, tmp_path: Path) -> None:
    network = yolo("yolov8n", tmp_path)
    # The trainer gives a network the classes of its data; here before it is pruned.
    network.model = type(network.model)(network.model.yaml, nc=3, verbose=False)
    compressor.prune(network.model, torch.zeros(1, 3, 64, 64), "l1", HALF)
    small = tmp_path / "small.pt"
    network.save(str(small))
    narrow, dense = shapes(network.model), shapes(yolo("yolov8n", tmp_path).model)
    network = YOLO(str(small))
    train_pruned(network, **arguments(data, tmp_path, epochs=1))
    assert shapes(network.model) == narrow
    result = prune_while_training(
        network, "l1", compressor.Budget(0.2, "macs"), pruner={"prune_every": 2}, **arguments(data, tmp_path, epochs=2)
    )
    assert result.reached
    assert shapes(network.model) != narrow
    assert shapes(network.model).keys() == dense.keys()


def test_a_pruned_network_keeps_its_classes(data: Path, tmp_path: Path) -> None:
    network = yolo("yolov8n", tmp_path)
    compressor.prune(network.model, torch.zeros(1, 3, 64, 64), "l1", HALF)
    network.save(str(tmp_path / "small.pt"))
    with pytest.raises(InputError, match=r"tells 80 classes, and the data have 3: prune one that was trained on these"):
        train_pruned(YOLO(str(tmp_path / "small.pt")), **arguments(data, tmp_path))


@pytest.mark.slow
def test_distillation_follows(data: Path, tmp_path: Path) -> None:
    teacher = yolo("yolo26n", tmp_path)
    teacher.train(**arguments(data, tmp_path, epochs=1, name="teacher"))
    network = yolo("yolo26n", tmp_path)
    result = prune_while_training(
        network,
        "l1",
        HALF,
        pruner={"prune_every": 3},
        **arguments(data, tmp_path, epochs=3, distill_model=str(tmp_path / "teacher" / "weights" / "best.pt")),
    )
    assert result.reached
    assert sum(tensor.numel() for tensor in network.model.parameters()) < 0.8 * sum(
        tensor.numel() for tensor in teacher.model.parameters()
    )


@pytest.mark.parametrize("name", ["yolov8n", pytest.param("yolo11n", marks=pytest.mark.slow)])
def test_what_ultralytics_exports_is_the_small_network(name: str, tmp_path: Path) -> None:
    network = yolo(name, tmp_path)
    compressor.prune(network.model, torch.zeros(1, 3, 64, 64), "l1", HALF)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.model.eval()(images)[0]
    network.model.pt_path = str(tmp_path / "small.pt")  # names the file that is written
    session = onnxruntime.InferenceSession(network.export(format="onnx", imgsz=64), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    assert relative_error(torch.from_numpy(found), expected) < 1e-4


@pytest.mark.slow
def test_quantisation_aware_training_follows(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    network = yolo("yolov8n", tmp_path)
    prune_while_training(network, "l1", HALF, pruner={"prune_every": 3}, **arguments(data, tmp_path, epochs=3))
    narrow = shapes(network.model)
    train_pruned(network, **arguments(data, tmp_path, epochs=1, name="int8", quantize=8))
    trained = YOLO(str(tmp_path / "int8" / "weights" / "last.pt"))
    assert {name: shape for name, shape in shapes(trained.model).items() if "quantizer" not in name} == narrow
    file = trained.export(format="onnx", imgsz=64, quantize=8)
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(file).graph.node)


@pytest.mark.slow
def test_half_a_batch_after_running_out_of_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = yolo("yolov8n", tmp_path)
    calls: list[int] = []

    def loss(self: DetectionModel, batch: dict[str, Tensor], preds: Any = None) -> Any:
        if self.training:
            calls.append(len(batch["img"]))
        if len(calls) == 2:
            self.predict(batch["img"])
            raise RuntimeError("CUDA out of memory")
        return plain(self, batch, preds)

    plain = DetectionModel.loss
    monkeypatch.setattr(DetectionModel, "loss", loss)
    result = prune_while_training(network, "relevance", HALF, **arguments(data, tmp_path, batch=16))
    assert calls[:4] == [16, 16, 8, 8]
    assert result.reached
    # Twice as many steps: the last cut comes where 65 % of all are done, not of half of them.
    assert 0.6 * 6 * EPOCHS <= cuts(tmp_path)[-1]["step"] <= 0.7 * 6 * EPOCHS


def test_out_of_memory_after_a_cut_does_not_count_the_budget_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = yolo("yolov8n", tmp_path)
    calls: list[int] = []

    def loss(self: DetectionModel, batch: dict[str, Tensor], preds: Any = None) -> Any:
        if self.training:
            calls.append(len(batch["img"]))
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory")
        return plain(self, batch, preds)

    plain = DetectionModel.loss
    monkeypatch.setattr(DetectionModel, "loss", loss)
    how = {"schedule": compressor.Linear(0.0, 0.5), "prune_every": 1}
    result = prune_while_training(network, "l1", HALF, pruner=how, **arguments(data, tmp_path, epochs=2, batch=16))
    assert calls[:4] == [16, 16, 16, 8]
    assert 0.5 <= result.removed < 0.55
    assert sum(tensor.numel() for tensor in network.model.parameters()) == result.params[1]
    assert cuts(tmp_path)[0]["params"] < result.params[0]  # before the error


def test_a_loss_that_is_not_finite_after_a_cut(data: Path, tmp_path: Path) -> None:
    network = yolo("yolov8n", tmp_path)

    def blow_up(trainer: Any) -> None:
        if trainer.epoch == 2:
            trainer.loss = torch.tensor(torch.nan)

    network.add_callback("on_train_epoch_end", blow_up)
    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 3: training diverged at lr = "):
        prune_while_training(network, "l1", HALF, pruner={"prune_every": 2}, **arguments(data, tmp_path, epochs=5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "0,1"}, "no callbacks to several devices"),
        ({"device": [0, 1]}, "no callbacks to several devices"),
        ({"compile": True}, "compile=True: the network changes"),
        ({"quantize": 8}, "quantize=8: layers that round are not cut; prune first"),
        ({"time": 0.1}, "time=0.1: the network changes while it trains; train with epochs="),
    ],
)
def test_what_would_not_prune_is_refused(wrong: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    network = yolo("yolov8n", tmp_path)
    with pytest.raises(InputError, match=message):
        prune_while_training(network, "l1", HALF, **arguments(data, tmp_path, **wrong))
    assert not (tmp_path / "run").exists()


def test_too_short_a_training_is_refused_before_it_starts(data: Path, tmp_path: Path) -> None:
    with pytest.raises(compressor.errors.PeriodError, match="train longer, or on larger batches"):
        prune_while_training(yolo("yolov8n", tmp_path), **arguments(data, tmp_path, epochs=2))
    assert not (tmp_path / "run" / "results.csv").exists()
