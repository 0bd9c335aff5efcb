"""`compress doctor`: which engines really work on this machine, found out by running a small network in each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from compressor.deploy import (
    describe_machine,
    export_onnx,
    first_line,
    has_openvino,
    open_openvino,
    open_session,
    openvino_version,
)

_GPU = "a GPU with its driver"


@dataclass(frozen=True)
class Finding:
    """Whether an engine works: what it says of itself, or why it does not and what to do."""

    engine: str
    works: bool
    says: str


def examine() -> list[Finding]:
    """Run a small network in every engine that a deployed model may run in, and say what came of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    images = torch.randn(2, 3, 16, 16)
    with TemporaryDirectory() as folder, torch.no_grad():
        file = export_onnx(model, Path(folder) / "probe.onnx", images).path
        expected = model(images)
        return [_tried(name, run, advice, expected) for name, run, advice in _engines(model, images, file)]


_Engine = tuple[str, Callable[[], Tensor], str]


def _engines(model: nn.Module, images: Tensor, file: Path) -> list[_Engine]:
    def on_gpu(compiled: bool) -> Tensor:
        moved = copy.deepcopy(model).cuda()
        scores: Tensor = (torch.compile(moved) if compiled else moved)(images.cuda())
        return scores.cpu()

    def in_onnxruntime(device: str, tensorrt: bool = False) -> Tensor:
        session = open_session(file, device, tf32=False, tensorrt=tensorrt)
        (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(out)

    def in_openvino() -> Tensor:
        if not has_openvino():
            raise ModuleNotFoundError("openvino is not installed")
        compiled = open_openvino(file)
        return torch.from_numpy(compiled([images.numpy()])[compiled.outputs[0]].copy())

    return [
        ("torch, cpu", lambda: model(images), "install torch"),
        ("torch.compile, cpu", lambda: torch.compile(model)(images), "install a C++ compiler (g++)"),
        ("torch, cuda", lambda: on_gpu(compiled=False), f"needs {_GPU}"),
        ("torch.compile, cuda", lambda: on_gpu(compiled=True), f"needs {_GPU}"),
        ("onnxruntime, cpu", lambda: in_onnxruntime("cpu"), "pip install onnxruntime"),
        ("onnxruntime, cuda", lambda: in_onnxruntime("cuda"), f"needs {_GPU}, and onnxruntime-gpu[cuda,cudnn]"),
        ("onnxruntime, tensorrt", lambda: in_onnxruntime("cuda", tensorrt=True), f"needs {_GPU}; pip install tensorrt"),
        ("openvino, cpu", in_openvino, "pip install openvino"),
    ]


def _tried(name: str, run: Callable[[], Tensor], advice: str, expected: Tensor) -> Finding:
    try:
        got = run()
    except Exception as refusal:  # whatever an engine raises is the answer to the question
        return Finding(name, False, f"{first_line(refusal)}; {advice}")
    if not torch.allclose(got, expected, atol=1e-4):
        return Finding(name, False, f"runs, and gives other results (by {float((got - expected).abs().max()):.1e})")
    package = name.partition(",")[0].partition(".")[0]
    return Finding(name, True, openvino_version() if package == "openvino" else str(describe_machine()[package]))
