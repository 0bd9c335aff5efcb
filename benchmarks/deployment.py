"""What pruning, aligned widths, a latency budget and lower precisions are worth in ONNX Runtime and OpenVINO on a CPU.

python benchmarks/deployment.py --part widths|gpu|accuracy|precision [--data cifar10 --weights FOLDER] [--batches 1]

widths: dense, less MACs with any widths and with rounded ones, and half of the latency asked for. gpu: the same widths
on a GPU, in PyTorch. accuracy: digits and CIFAR-10 at equal measured latency, budgeted by MACs and by latency, as cut
and after an epoch. precision: float32, float16 and int8, whole and pruned.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from cifar_resnet import NETWORKS as NETWORKS_OF_CIFAR
from cifar_resnet import data, first_batches, trained
from results_file import write
from short_training import train
from torch import nn
from torchvision import models

import compressor
from compressor.deploy import (
    LatencyCost,
    Place,
    export_onnx,
    lower_precision,
    measure,
    onnx_runner,
    openvino_runner,
    torch_runner,
)
from compressor.training import Data, evaluate, load_data
from compressor.training.models import build

NETWORKS: dict[str, tuple[Any, int]] = {
    "resnet18": (models.resnet18, 224),
    "resnet18, CIFAR stem": (lambda: build("resnet18", classes=10, stem="cifar", seed=0), 32),
    "mobilenet_v2": (models.mobilenet_v2, 224),
    "regnet_x_400mf": (models.regnet_x_400mf, 224),
    "vgg16_bn": (models.vgg16_bn, 224),
}
ENGINES: dict[str, Callable[[Path, Any], Callable[[], object]]] = {
    "onnxruntime": onnx_runner,
    "openvino": openvino_runner,
}
BUDGETS: dict[str, dict[str, Any]] = {
    "MACs -30 %, any widths": {"budget": compressor.Budget(0.3, "macs"), "round_to": 1},
    "MACs -30 %, multiples of 16": {"budget": compressor.Budget(0.3, "macs"), "round_to": 16},
    "MACs -50 %, any widths": {"budget": compressor.Budget(0.5, "macs"), "round_to": 1},
    "MACs -50 %, multiples of 16": {"budget": compressor.Budget(0.5, "macs"), "round_to": 16},
    "latency -50 % (batch 1)": {"budget": 1},
    "latency -50 % (batch 32)": {"budget": 32},
    "latency -50 % (batch 1, openvino)": {"budget": 1, "engine": "openvino"},
}


def main(
    part: Annotated[str, typer.Option(help="widths, gpu, accuracy or precision.")],
    weights: Annotated[Path | None, typer.Option(help="Folder with NETWORK-cifar10.safetensors.")] = None,
    source: Annotated[str, typer.Option("--data", help="As for compress --data.")] = "cifar10",
    networks: Annotated[str, typer.Option(help="With | between them; all by default.")] = "",
    batches: Annotated[str, typer.Option(help="Sizes that widths are timed and budgeted at: 1,32.")] = "1,32",
) -> None:
    """Measure, write, and print where the table is."""
    torch.set_num_threads(1)
    known = {"accuracy": TRAINED, "precision": ("",)}.get(part, NETWORKS)
    for name in networks.split("|") if networks else known:
        file = f"deployment-{part}-{name}".replace(", ", "-").replace(" ", "-").rstrip("-")
        if part == "widths":
            path = write(file, widths(name, [int(size) for size in batches.split(",")]), WIDTHS)
        elif part == "gpu":
            path = write(file, on_gpu(name), GPU)
        else:
            assert weights, "give --weights"
            rows = accuracy(name, source, weights) if part == "accuracy" else precision(source, weights)
            for done in rows:
                path = write(file, done, ACCURACY if part == "accuracy" else PRECISION)
        print(path, flush=True)


WIDTHS = (
    "One CPU thread, random weights, L1 norm, the same share of every group. p50 in milliseconds, all networks of an "
    "engine and batch in turns; a budget of latency is one in ONNX Runtime where nothing else is said; `noise`: what "
    "the dense network and itself differ by. `realised`: how many times as fast, over how many times fewer MACs. "
    "`asked`: of the latency, `predicted` by the table of layers, `measured` when it was cut; `table off`: its time "
    "for the pruned network against the measured."
)


def widths(name: str, batches: list[int]) -> list[dict[str, Any]]:
    """Return a row for each way to cut one network."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    dense = make().eval()
    x = torch.zeros(1, 3, size, size)
    rows: list[dict[str, Any]] = [{"cut": "dense", "MACs %": 100.0}]
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        files = {"dense": export_onnx(dense, Path(folder) / "dense.onnx", x).path}
        rows[0]["export + gate s"] = time.perf_counter() - began
        for number, (label, how) in enumerate(BUDGETS.items()):
            if isinstance(how["budget"], int) and how["budget"] not in batches:
                continue
            model = copy.deepcopy(dense)
            rows.append(cut(model, x, label, how))
            files[label] = export_onnx(model, Path(folder) / f"{number}.onnx", x).path
        for (engine, runner), batch in itertools.product(ENGINES.items(), batches):
            inputs = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            runners = {label: runner(path, inputs) for label, path in files.items()}
            runners["again"] = runner(files["dense"], inputs)
            times = measure(runners, runs=100, min_runs=5, budget_s=40)
            where = f"{engine}, batch {batch}"
            for row in rows:
                row[f"p50 ms, {where}"] = times[row["cut"]].p50_ms
                ratio = times["dense"].p50_ms / times[row["cut"]].p50_ms
                row[f"as fast, {where}"] = ratio
                row[f"realised, {where}"] = ratio * row["MACs %"] / 100
                row["n"] = min(row.get("n", 10**6), times["dense"].n)
            again = times["again"].p50_ms / times["dense"].p50_ms - 1
            rows[0][f"noise %, {where}"] = 100 * abs(again)
    return rows


def cut(model: nn.Module, x: torch.Tensor, label: str, how: dict[str, Any]) -> dict[str, Any]:
    """Cut a model, and say how."""
    if not isinstance(how["budget"], int):
        found = compressor.prune(model, x, "l1", **how)
        return {"cut": label, "MACs %": 100 * found.macs[1] / found.macs[0]}
    cost = LatencyCost(Place(how.get("engine", "onnxruntime"), batch=how["budget"]))
    began = time.perf_counter()
    cost.count(compressor.trace(model, x))  # so that what the table takes is known
    table_s = time.perf_counter() - began
    found = compressor.prune(model, x, "l1", compressor.Budget(0.5, cost))
    assert found.measured is not None
    off = next((note.rpartition(": ")[2] for note in found.notes if note.startswith("the layers' table")), "below 10 %")
    said = {"asked %": 50.0, "predicted %": 100 * found.removed, "measured %": 100 * found.measured}
    row = {"cut": label, "MACs %": 100 * found.macs[1] / found.macs[0], **said}
    return {**row, "table off": off, "table s": table_s, "cut s": time.perf_counter() - began - table_s}


GPU = (
    "Random weights, L1 norm, the same share of every group; p50 in milliseconds with the images on the GPU, all "
    "networks "
    "of a precision and batch in turns; `again` is the dense network once more. torch: eager, channels-last; graph: "
    "the "
    "same as a CUDA graph, without the time of launching kernels. `realised`: how many times as fast, over how many "
    "times fewer MACs."
)
SHARES, MULTIPLES, GPU_BATCHES = (0.3, 0.5), (1, 8, 16, 32), (1, 32, 256)
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def on_gpu(name: str, device: str = "cuda") -> list[dict[str, Any]]:
    """Return a row for each way to cut one network, way to run it, precision and batch."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    models_: dict[str, tuple[nn.Module, float]] = {"dense": (make().eval(), 100.0)}
    models_["again"] = models_["dense"]
    for share in SHARES:
        for multiple in MULTIPLES:
            model = copy.deepcopy(models_["dense"][0])
            how = {"budget": compressor.Budget(share, "macs"), "round_to": multiple}
            row = cut(model, torch.zeros(1, 3, size, size), "", how)
            models_[f"MACs -{share:.0%}, multiples of {multiple}"] = model, row["MACs %"]
    rows = []
    for (precision, dtype), batch in itertools.product(DTYPES.items(), GPU_BATCHES):
        x = torch.randn(batch, 3, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        ready = {
            label: copy.deepcopy(model).to(device, dtype, memory_format=torch.channels_last)
            for label, (model, _) in models_.items()
        }
        ways = {"torch": {label: torch_runner(model, x) for label, model in ready.items()}}
        if device != "cpu":
            ways["graph"] = {label: torch_runner(model, x, as_graph=True) for label, model in ready.items()}
        for way, runners in ways.items():
            times = measure(runners, runs=100, min_runs=20, budget_s=3)
            for label, (_, macs) in models_.items():
                fast = times["dense"].p50_ms / times[label].p50_ms
                row = {"run by": way, "precision": precision, "batch": batch, "cut": label, "MACs %": macs}
                row |= {"p50 ms": times[label].p50_ms, "as fast": fast, "realised": fast * macs / 100}
                rows.append({**row, "n": times[label].n})
    return rows


ACCURACY = (
    "Test accuracy in percent: of trained networks that others trained (CIFAR-10), and of one trained here (digits, "
    "20 epochs). L1 norm, four rounds, linear compensation and reconstruction over 1,000 images; `one epoch`: after "
    "one more epoch (SGD, 0.02 falling to 0, batches of 128). `latency` is measured in ONNX Runtime on one CPU thread "
    "at batch 32, all networks of one kind in turns, as a share of the dense one's. By MACs: multiples of 8 in groups "
    "of 64, any width below."
)


TRAINED = ("resnet20, digits", "resnet20, CIFAR-10")


def accuracy(name: str, source: str, weights: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows so far of one network, by budget: all cuts and their latencies first, only they are timed."""
    if name == "resnet20, digits":
        found = load_data("digits", seed=0, image_size=16)
        torch.manual_seed(0)
        dense = NETWORKS_OF_CIFAR["resnet20"]()
        train(dense, found, 20, seed=0)
    else:
        found, dense = data(source), trained("resnet20", weights)
    made = at_equal_latency(name, found, dense.eval())
    rows = [row for row, _ in made]
    yield rows
    for row, model in sorted(made[1:], key=lambda each: each[0]["as cut"]):  # where an epoch counts most
        train(model, found, 1, seed=0)
        row["one epoch"] = right(model, found)
        yield rows


def at_equal_latency(name: str, found: Data, dense: nn.Module) -> list[tuple[dict[str, Any], nn.Module]]:
    """Return one network, and it cut to each budget, with what is measured of each."""
    batches = [x for x, _ in first_batches(found, 1000)]
    x = batches[0][:1]
    models_: dict[str, nn.Module] = {"dense": dense}
    macs = {"dense": 100.0}
    budgets = {f"MACs -{share:.0%}": compressor.Budget(share, "macs") for share in (0.3, 0.4, 0.5, 0.6, 0.7)}
    budgets |= {
        f"latency -{share:.0%}": compressor.Budget(share, LatencyCost(Place(batch=32))) for share in (0.2, 0.3, 0.4)
    }
    for label, budget in budgets.items():
        models_[label] = copy.deepcopy(dense)
        how = {"rounds": 4, "calibration": batches, "compensate": "linear"}
        cut = compressor.prune(models_[label], x, "l1", budget, **how)
        macs[label] = 100 * cut.macs[1] / cut.macs[0]
    with TemporaryDirectory() as folder:
        files = {
            label: export_onnx(model, Path(folder) / f"{number}.onnx", x).path
            for number, (label, model) in enumerate(models_.items())
        }
        runners = {label: onnx_runner(path, batches[0][:32]) for label, path in files.items()}
        times = measure(runners, runs=200, budget_s=30)
    return [
        (
            {
                "network": name,
                "cut": label,
                "MACs %": macs[label],
                "latency %": 100 * times[label].p50_ms / times["dense"].p50_ms,
                "as cut": right(model, found),
            },
            model,
        )
        for label, model in models_.items()
    ]


def right(model: nn.Module, found: Any) -> float:
    """Return the test accuracy in percent."""
    return 100 * evaluate(model, found.test).accuracy


PRECISION = (
    "ONNX Runtime on one CPU thread; p50 in milliseconds at batch 32, whole and pruned, all precisions in turns. "
    "int8: static, calibrated on 256 training images. Accuracy of the trained networks on the CIFAR-10 test part; of "
    "ResNet-18 with random weights only the time. `gate`: what the precision was held to on the validation part."
)


def precision(source: str, weights: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows so far, by network and precision."""
    rows: list[dict[str, Any]] = []
    found = data(source)
    batches = [x for x, _ in first_batches(found, 1000)]
    calibration = [x.numpy() for x, _ in first_batches(found, 300)][:3]
    check = [(x.numpy(), y.numpy()) for x, y in found.validation.batches(500)]
    test = [(x.numpy(), y.numpy()) for x, y in found.test.batches(500)]
    with TemporaryDirectory() as folder:
        for network in ("resnet20", "resnet32"):
            dense = trained(network, weights)
            pruned = copy.deepcopy(dense)
            half = compressor.Budget(0.5, LatencyCost(Place(batch=32)))
            compressor.prune(pruned, batches[0][:1], "l1", half, rounds=4, calibration=batches, compensate="linear")
            for label, model in (("dense", dense), ("latency -50 %", pruned)):
                name = f"{network}, {label}"
                rows += in_precisions(name, model, batches[0][:32], folder, calibration, check, test)
                yield rows
        torch.manual_seed(0)
        noise = torch.randn(32, 3, 224, 224)
        model = models.resnet18().eval()
        some = [(noise.numpy(), model(noise).argmax(1).numpy())]
        rows += in_precisions("resnet18, 224 pixels", model, noise, folder, [noise.numpy()], some, [])
        yield rows


def in_precisions(
    name: str, model: nn.Module, inputs: torch.Tensor, folder: str, calibration: list, check: list, test: list
) -> list[dict[str, Any]]:
    """Return a row for each precision of one network."""
    whole = export_onnx(model, Path(folder) / "whole.onnx", inputs[:2]).path
    files, rows = {"fp32": whole}, []
    said: dict[str, str] = {"fp32": ""}
    for each in ("fp16", "int8"):
        tolerance = {} if test else {"tolerance": 0.99}  # random weights: every class is as likely
        made = lower_precision(
            whole, Path(folder) / f"{each}.onnx", each, check=check, calibration=calibration, **tolerance
        )
        files[each] = made.path
        said[each] = f"cosine {made.cosine:.5f}, top-1 {made.top1_agreement:.2%}" + (
            f", {made.whole_accuracy:.2%} to {made.accuracy:.2%}" if test else ""
        )
    times = measure({each: onnx_runner(path, inputs) for each, path in files.items()}, runs=100, budget_s=30)
    for each, path in files.items():
        row: dict[str, Any] = {"network": name, "precision": each, "kB": path.stat().st_size / 1e3}
        row |= {"p50 ms": times[each].p50_ms, "as fast": times["fp32"].p50_ms / times[each].p50_ms, "n": times[each].n}
        rows.append({**row, "accuracy": file_accuracy(path, test) if test else "", "gate": said[each]})
    return rows


def file_accuracy(path: Path, test: list) -> float:
    """Return the accuracy of an ONNX file in percent."""
    session = compressor.deploy.open_session(path)
    name = session.get_inputs()[0].name
    return float(100 * np.mean(np.concatenate([session.run(None, {name: x})[0].argmax(1) == y for x, y in test])))


if __name__ == "__main__":
    typer.run(main)
