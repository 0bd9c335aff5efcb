"""How much memory a model in a file takes: in a process of its own, so that nothing else is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Linux keeps the largest size that a process had, and forgets it on request: imports take more for a moment.
_MEASURED = """
import json, sys
import numpy, onnxruntime

def size(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

path, inputs, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.log_severity_level = 3
with open("/proc/self/clear_refs", "w") as peaks:
    peaks.write("5")
before = size("VmRSS")
feed = {name: numpy.zeros(shape, dtype) for name, (dtype, shape) in inputs.items()}
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, feed)
print(1024 * (size("VmHWM") - before))
"""
_PATIENCE_S = 300


def peak_memory(path: Path, inputs: Mapping[str, np.ndarray[Any, Any]], threads: int = 1) -> int | None:
    """Return the bytes by which a process grows that loads an ONNX file into onnxruntime and runs it on a CPU.

    Weights, what runs at once, and the inputs count. None where that cannot be told: elsewhere than on Linux, or if the
    file does not run.

    Args:
        path: the file.
        inputs: by name; their values do not matter.
        threads: CPU threads of one operation.
    """
    if not sys.platform.startswith("linux"):
        return None
    shapes = {name: (str(each.dtype), list(each.shape)) for name, each in inputs.items()}
    # -I: nothing that lies in the working folder is imported.
    command: Sequence[str] = (sys.executable, "-I", "-c", _MEASURED, str(path), json.dumps(shapes), str(threads))
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE_S)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
