"""Detectors pruned by Ultralytics' own trainer, on drawn shapes: mAP, multiply-adds, latency in ONNX Runtime.

python benchmarks/detectors.py --work runs/detectors [--networks yolov8n,yolo11n] [--methods dense,relevance] \
    [--seeds 1] [--epochs 20] [--trained] [--part train|latency|exports]

With --trained, pruning begins with the dense network of the same work folder and takes half as many epochs; else it
begins with random weights. Training needs minutes a row on one core; a row whose network is in the work folder is not
trained again. Latencies are measured of all networks in the folder in one run, in turns: let nothing else run then.
Part `exports`: networks with random weights, cut by half, as Ultralytics itself writes them, held against PyTorch.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("YOLO_OFFLINE", "true")

import torch
import typer
from onnxruntime import InferenceSession
from results_file import write
from shapes import write_yolo_dataset
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

import compressor
from compressor.deploy import fvcore_macs, measure, open_session, session_runner
from compressor.integrations.ultralytics import export_onnx, prune_while_training

METHODS = ("dense", "relevance", "l1", "random")
IMAGES, SIZE, BATCH, SHARE = {"train": 480, "val": 120}, 96, 16, 0.5
CPU = torch.device("cpu")
SIZES = (96, 640)  # at which latency is measured
NOTE = (
    f"{IMAGES['train']} training and {IMAGES['val']} validation images of squares, circles and triangles, {SIZE} "
    f"pixels square, drawn by benchmarks/shapes.py; batches of {BATCH}, Ultralytics' own defaults but for one epoch of "
    f"warm-up. Pruned: {SHARE:.0%} of the multiply-adds go while training, by the usual schedule and allocation, in as "
    "many epochs as the dense network has, or half as many more from the trained one. mAP is that of best.pt on the "
    "validation images."
)


def main(
    work: Annotated[Path, typer.Option(help="Folder for data, networks and rows; goes on where it stopped.")],
    networks: Annotated[str, typer.Option(help="Comma list of Ultralytics' configurations.")] = "yolov8n,yolo11n",
    methods: Annotated[str, typer.Option(help="Comma list.")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="Trainings of each.")] = 1,
    epochs: Annotated[int, typer.Option(help="Of every training.")] = 20,
    trained: Annotated[bool, typer.Option(help="Prune the trained dense network.")] = False,
    part: Annotated[str, typer.Option(help="train, latency, both of them, or exports.")] = "both",
) -> None:
    """Train, measure, write, and print where the tables are."""
    work.mkdir(parents=True, exist_ok=True)
    if part in ("train", "both"):
        data = work / "shapes" / "data.yaml"
        if not data.exists():
            write_yolo_dataset(data.parent, IMAGES, SIZE)
        for seed in range(seeds):
            for network in networks.split(","):
                for method in methods.split(","):
                    start = best_of(work / name_of(network, "dense", seed)) if trained and method != "dense" else None
                    folder = work / name_of(network, f"{method}_trained" if start else method, seed)
                    if not (folder / "row.json").exists():
                        row = train(network, method, seed, epochs // 2 if start else epochs, data, folder, start)
                        (folder / "row.json").write_text(json.dumps(row))
        rows = [json.loads(file.read_text()) for file in sorted(work.glob("*/row.json"))]
        print(write("detectors", rows, NOTE))
    if part == "exports":
        print(write("detectors-exports", exports(work), NOTE_EXPORTS))
    if part in ("latency", "both"):
        print(write("detectors-latency", latencies(work), "ONNX Runtime, one thread, one image, one run in turns."))


EXPORTED = (
    "yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8-worldv2", "yolov9t", "yolov9c", "yolov10n", "yolo11n",
    "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls", "yolo12n", "yolo26n", "yolo26n-seg",
)  # fmt: skip
NOTE_EXPORTS = (
    "Half of the multiply-adds gone by L1 norm, random weights, 64 pixels; `yolo.export(format='onnx')` in ONNX "
    "Runtime against the same network in PyTorch: the norm of the difference, of that of the output."
)


def exports(work: Path) -> list[dict[str, Any]]:
    """Return a row for each network that Ultralytics exports after a cut."""
    torch.manual_seed(0)
    images = torch.rand(1, 3, 64, 64)
    rows = []
    for name in EXPORTED:
        yolo = YOLO(f"{name}.yaml")
        yolo.model.pt_path = str(work / f"{name}.pt")  # names the file that is written
        result = compressor.prune(yolo.model, torch.zeros(1, 3, 64, 64), "l1", compressor.Budget(SHARE, "macs"))
        with torch.no_grad():
            expected = yolo.model.eval()(images)
        while not isinstance(expected, torch.Tensor):
            expected = expected[0]
        session = InferenceSession(yolo.export(format="onnx", imgsz=64), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        apart = float((found - expected).norm() / expected.norm())
        rows.append({"network": name, "MACs left": result.macs[1] / result.macs[0], "relative difference": apart})
    return rows


def name_of(network: str, method: str, seed: int) -> str:
    return f"{network}-{method}-{seed}"


def best_of(folder: Path) -> Path:
    return folder / "weights" / "best.pt"


def train(
    network: str, method: str, seed: int, epochs: int, data: Path, folder: Path, start: Path | None
) -> dict[str, Any]:
    """Train one network, pruned or not, and return its row; `folder` holds what the trainer writes."""
    arguments = {"data": str(data.resolve()), "epochs": epochs, "imgsz": SIZE, "batch": BATCH, "seed": seed}
    place = {"project": str(folder.parent.resolve()), "name": folder.name, "exist_ok": True, "device": "cpu"}
    quiet = {"plots": False, "verbose": False, "warmup_epochs": 1, "cache": True}
    yolo = YOLO(start or f"{network}.yaml")
    began = time.perf_counter()
    if method == "dense":
        yolo.train(**arguments, **place, **quiet)
    else:
        budget = compressor.Budget(SHARE, "macs")
        prune_while_training(yolo, method, budget, pruner={"seed": seed}, **arguments, **place, **quiet)
    seconds = time.perf_counter() - began
    found = yolo.val(data=str(data.resolve()), imgsz=SIZE, device="cpu", plots=False, verbose=False)
    model = best(folder)
    return {
        "network": network,
        "method": method,
        "begins with": "the trained network" if start else "random weights",
        "seed": seed,
        "epochs": epochs,
        "mAP50": 100 * float(found.box.map50),
        "mAP50-95": 100 * float(found.box.map),
        "MMACs": fvcore_macs(model, torch.zeros(1, 3, SIZE, SIZE)) / 1e6,
        "params": sum(tensor.numel() for tensor in model.parameters()),
        "minutes": seconds / 60,
    }


def best(folder: Path) -> nn.Module:
    model: nn.Module = load_checkpoint(str(best_of(folder)))[0]
    return model.eval()


def latencies(work: Path) -> list[dict[str, Any]]:
    """Export every network in the folder and time all of them in turns, at each image size."""
    rows = []
    folders = sorted(file.parent for file in work.glob("*/row.json"))
    for size in SIZES:
        images = torch.rand(1, 3, size, size)
        runners = {}
        for folder in folders:
            path = folder / f"best-{size}.onnx"
            if not path.exists():
                export_onnx(YOLO(best_of(folder)), path, imgsz=size)
            runners[folder.name] = session_runner(open_session(path), images, CPU)
        # A/A: the first network a second time, what differs there is noise.
        first = folders[0]
        runners["again"] = session_runner(open_session(first / f"best-{size}.onnx"), images, CPU)
        taken = measure(runners, budget_s=120)
        for folder in folders:
            network, _, seed = folder.name.rsplit("-", 2)
            dense = taken[f"{network}-dense-{seed}"].p50_ms
            latency = taken[folder.name]
            rows.append(
                {
                    "network": folder.name,
                    "pixels": size,
                    "p50 ms": latency.p50_ms,
                    "p90 ms": latency.p90_ms,
                    "times as fast as dense": dense / latency.p50_ms,
                    "n": latency.n,
                    "A/A": taken["again"].p50_ms / taken[first.name].p50_ms,
                }
            )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
