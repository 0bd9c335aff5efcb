"""The machine and the versions that figures were taken with: without them no latency means anything to a colleague."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "torchvision", "onnxruntime", "onnx")
# What a convolution is computed with, as `torch.cpu.get_capabilities` names it.
_SIMD = (
    *("avx2", "avx512_f", "avx512_bf16", "avx_vnni", "avx512_vnni", "amx_bf16", "amx_int8"),
    *("neon", "dotprod", "bf16", "i8mm", "sve", "sve2", "sme"),
)


def describe_machine() -> dict[str, Any]:
    """Return processor, memory, GPU, system and versions by name; no host name and no paths, reports are passed on."""
    return {
        "cpu": _cpu_name(),
        # Two virtual machines on "AMD EPYC" may differ in AVX-512, and then every latency does.
        "simd": _simd(),
        # The cores that this process may use: in a container these are fewer than the machine has.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _cpu_name() -> str:
    # `platform.processor()` is empty or just "x86_64" on Linux.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _simd() -> str:
    """Return the vector instructions of the processor, as far as PyTorch sees them."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not every PyTorch has it
    return ", ".join(name for name in _SIMD if known.get(name)) or torch.backends.cpu.get_cpu_capability().lower()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows does not tell
        return None


def _version(name: str) -> str | None:
    """Return the version of an installed package; onnxruntime comes under two names."""
    for distribution in (name, f"{name}-gpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def versions() -> dict[str, str]:
    """Return the versions of the packages that make a model's file, by name."""
    return {name: importlib.metadata.version(name) for name in ("compressor", "torch", "torchvision")}
