"""Curves for TensorBoard: TensorBoard's own reader finds in them what `metrics.jsonl` holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compressor import job
from compressor.errors import InputError
from compressor.job.board import Board, clear_board

Settings = job.Settings


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: [(each.step, each.value) for each in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_a_run_writes_the_curves_of_its_records(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "user_models:tiny", "data": "digits", "epochs": 2, "tensorboard": True}
    seen: list[dict[str, Any]] = []
    job.run(Settings.from_options({**given, "out": str(tmp_path / "run")}), timings=False, on_record=seen.append)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert seen == records
    found = curves(tmp_path / "run" / "tensorboard")
    for stage in ("dense", "pruned"):
        of_stage = [each for each in records if each["stage"] == stage and "train_loss" in each]
        for name in ("train_loss", "validation_accuracy", "lr"):
            assert found[f"{stage}/{name}"][-2:] == [(each["step"], pytest.approx(each[name])) for each in of_stage]
    cuts = [each for each in records if each.get("event") == "cut"]
    assert cuts
    assert [step for step, _ in found["pruned/macs"]] == [each["step"] for each in cuts]


def test_an_earlier_runs_curves_go_and_nothing_else(tmp_path: Path) -> None:
    Board(tmp_path / "board").show({"stage": "dense", "step": 1, "train_loss": 2.0, "note": "text", "fine": True})
    assert curves(tmp_path / "board") == {"dense/train_loss": [(1, 2.0)]}
    (tmp_path / "board" / "notes.txt").write_text("mine")
    clear_board(tmp_path / "board")
    assert [path.name for path in (tmp_path / "board").iterdir()] == ["notes.txt"]
    clear_board(tmp_path / "nothing")


def test_a_machine_without_tensorboard_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(InputError, match=r"pip install 'compressor\[tensorboard\]'"):
        Settings.from_options({"tensorboard": True})
