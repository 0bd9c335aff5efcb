"""What a file takes in memory: weights and what runs at once, counted in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_report import sample
from torch import nn
from typer.testing import CliRunner

import compressor
from compressor import job
from compressor.cli import app
from compressor.deploy import peak_memory
from compressor.report import tables

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told on Linux alone")
MB = 1_000_000


def exported(model: nn.Module, path: Path, *shape: int) -> Path:
    return compressor.export_onnx(model.eval(), path, torch.zeros(2, *shape), input_names=["x"]).path


def test_weights_and_maps_count(tmp_path: Path) -> None:
    wide = exported(nn.Sequential(nn.Linear(1000, 10_000), nn.Linear(10_000, 10)), tmp_path / "wide.onnx", 1000)
    few, many = (peak_memory(wide, {"x": np.zeros((n, 1000), np.float32)}) for n in (1, 1000))
    assert 40 * MB < few < 150 * MB  # ten million weights, and room to lay them out anew
    assert 35 * MB < many - few < 150 * MB  # a thousand hidden vectors of ten thousand


def test_what_does_not_run_has_no_size(tmp_path: Path) -> None:
    path = exported(nn.Linear(4, 2), tmp_path / "small.onnx", 4)
    assert peak_memory(path, {"x": np.zeros((1, 5), np.float32)}) is None
    assert peak_memory(tmp_path / "absent.onnx", {}) is None


def test_the_tables_show_it(tmp_path: Path) -> None:
    rows = {row.label: row for row in tables.comparison(sample())}
    assert (rows["memory in onnxruntime, batch 8"].dense, rows["memory in onnxruntime, batch 8"].change) == (
        "3.00 MB", "-33.3%",
    )  # fmt: skip
    path = exported(nn.Linear(1000, 3000), tmp_path / "it.onnx", 1000)
    shown = CliRunner().invoke(app, ["benchmark", str(path), "--batch-size", "4"]).stdout
    assert "images/s" in shown
    assert " MB " in shown


def test_memory_is_that_of_the_engine_which_was_timed(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = exported(nn.Linear(1000, 3000), tmp_path / "it.onnx", 1000)
    known = {}
    for engine in ("onnxruntime", "openvino"):
        times, _ = job.timed_files.timed([path], 4, "cpu", 1, "", None, [engine])
        known[engine] = times[str(path)].memory_bytes
    assert known["onnxruntime"] > 10 * MB
    assert known["openvino"] is None
