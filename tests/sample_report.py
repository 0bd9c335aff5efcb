"""A small report with something in every part."""

import dataclasses

from compressor.report.document import (
    ClassAccuracy,
    Cut,
    Epoch,
    Figures,
    FrozenLayer,
    Goal,
    GroupRelevance,
    Layer,
    LayerTime,
    Parity,
    PeakMemory,
    Report,
    Timing,
)


def figures(**changes: object) -> Figures:
    return dataclasses.replace(
        Figures(
            accuracy=0.98,
            loss=0.07,
            images=449,
            params=10_000,
            macs=200_000,
            channels=64,
            fvcore_macs=201_000,
            size_bytes=42_000,
            onnx_size_bytes=43_000,
        ),
        **changes,
    )


def epoch(stage: str, number: int, **changes: object) -> Epoch:
    return dataclasses.replace(Epoch(stage, number, 10 * number, 0.5, 0.6, 0.9, 0.1, 1.0, 10_000), **changes)


def timing(model: str, batch_size: int = 1, p50_ms: float = 2.0, backend: str = "torch") -> Timing:
    shares = (0.8, 0.9, 0.95, 1.0, 1.0, 1.0, 1.05, 1.1, 1.1, 1.2, 2.0)
    return Timing(model, backend, "cpu", batch_size, tuple(p50_ms * share for share in shares))


def sample() -> Report:
    return Report(
        name="demo",
        created="2026-11-24T01:02:03+00:00",
        command="compress --model resnet18 --out runs/demo",
        settings={"model": "resnet18", "data": "digits", "criterion": "relevance", "sparsity": 0.6, "confidence": 0.95},
        machine={"cpu": "a processor", "cores": 2},
        dense=figures(),
        pruned=figures(accuracy=0.97, params=4_000, macs=100_000, channels=32),
        goal=Goal("params", 0.6, 0.6),
        layers=(Layer("conv1", 64, 32), Layer("conv2", 128, 16)),
        frozen=(FrozenLayer("fc.weight", 0, "reaches the output", 10),),
        epochs=tuple(epoch(stage, number) for stage in ("dense", "pruned") for number in (1, 2, 3)),
        cuts=(Cut("pruned", 15, 20, 7_000), Cut("pruned", 20, 12, 4_000)),
        timings=(
            *(timing("dense", p50_ms=3.0), timing("pruned", p50_ms=1.5)),
            *(timing("dense", 8, p50_ms=12.0), timing("pruned", 8, p50_ms=4.0)),
        ),
        layer_times=(
            LayerTime("conv1", 0.5, 0.25, (64, 3, 3, 3), (32, 3, 3, 3)),
            LayerTime("conv2", 2.0, 1.9, (128, 64, 3, 3), (13, 32, 3, 3)),
            LayerTime("", 0.1, 0.1),
        ),
        parity=(Parity("model.onnx", 1e-6, 1e-7, 15, 1.0, ("CPUExecutionProvider",)),),
        files={"model.safetensors": 42_000},
        memory=(PeakMemory(8, 3_000_000, 2_000_000),),
        notes=("ran on one core",),
        relevance=(
            GroupRelevance("conv1", (-0.4, 0.2, 7.5, 40.0), (False, False, True, True), 2, 0.91),
            GroupRelevance("layer1.0", (1.1, -3.0), (False, False), 1, 0.2),
        ),
        classes=(ClassAccuracy("cat", 200, 0.97, 0.98), ClassAccuracy("dog", 249, 0.99, 0.96)),
    )
