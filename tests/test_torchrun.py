"""`torchrun -m compressor`: one run folder, made by several processes; killed, stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # each starts processes that import PyTorch, and most of them twice

TINY = ["--model", "user_models:tiny", "--data", "digits", "--batch-size", "64", "--lr", "0.02", "--seed", "3"]
HERE = Path(__file__).parent


def start(folder: Path, *more: str, ranks: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    line = [*launcher, f"--max-restarts={restarts}", "-m", "compressor", *more, "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize("how", [["--criterion", "relevance"], ["--criterion", "l1"]], ids=["during", "after"])
def test_one_run_of_two_processes(how: list[str], tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path / "run", *TINY, *how, "--epochs", "4"))
    assert code == 0, err
    assert out.count("model.onnx") <= 2  # rank 0 alone prints
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["goal"]["met"]
    assert report["pruned"]["accuracy"] > 0.3
    assert report["pruned"]["params"] < 0.6 * report["dense"]["params"]


def test_a_dying_rank_ends_the_others_and_any_number_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, *TINY, "--epochs", "12", "--checkpoint-every", "5")
    wait_for(run / "checkpoint" / "pruned" / "previous.pt", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0
    assert "compress --resume" in err or "another process of this training has ended" in err
    assert not (run / "report.json").exists()
    code, _, err = finish(start(run, "--resume", ranks=1))
    assert code == 0, err
    assert json.loads((run / "report.json").read_text())["goal"]["met"]


def test_torchrun_restarts_where_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, *TINY, "--epochs", "12", "--checkpoint-every", "5", restarts=1)
    wait_for(run / "checkpoint" / "pruned" / "previous.pt", process)
    dense = run / "checkpoint" / "dense" / "state.pt"
    trained_at = dense.stat().st_mtime_ns
    os.kill(workers(process)[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert json.loads((run / "report.json").read_text())["goal"]["met"]
    assert dense.stat().st_mtime_ns == trained_at  # the stage that was over was not trained again


def test_a_signal_stops_all_of_them_at_one_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, *TINY, "--epochs", "12", "--checkpoint-every", "5")
    wait_for(run / "checkpoint" / "dense" / "state.pt", process)
    os.kill(workers(process)[0], signal.SIGTERM)
    code, _, err = finish(process)
    assert code != 0
    assert "stopped; go on with: compress --resume" in err
    assert "has ended" not in err
    state = run / "checkpoint" / "dense" / "state.pt"
    assert state.exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--batch-size", "33"], "2 processes cannot share batches of 33 images evenly: give --batch-size 32"),
        (["--measure", "latency"], "--measure latency times layers"),
        (["--criterion", "nonsense"], "unknown criterion 'nonsense'"),
    ],
)
def test_refused_in_words(more: list[str], says: str, tmp_path: Path) -> None:
    code, _, err = finish(start(tmp_path / "run", *TINY[:4], *more, "--epochs", "1"))
    assert code != 0
    assert says in err


def test_other_commands_are_no_work_for_many(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "compressor"]
    done = subprocess.run([*line, "doctor"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "start compress doctor without it" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    code, _, err = finish(start(tmp_path / "run", *TINY, "--device", "cuda", "--epochs", "1"))
    assert code != 0
    assert "no usable GPU" in err
