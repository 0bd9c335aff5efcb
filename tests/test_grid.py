"""Grids of runs: what is run and what is not, stops and failures, and shares of the work."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compressor import job, report
from compressor.errors import InputError, RangeError, RunFolderError, UnknownNameError
from compressor.job import Grid, run_grid
from compressor.job import grid as grids

TINY = {"model": "user_models:tiny", "epochs": 1, "prune-every": 9, "round-to": 4, "compensate": "mean"}


def grid(out: Path, **changes: object) -> Grid:
    made = Grid(TINY, ("l1", "random"), (0.5,), 1, str(out))
    return dataclasses.replace(made, **changes)


def times(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/report.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Grid, Path]:
    out = tmp_path_factory.mktemp("grids") / "study"
    made = grid(out)
    run_grid(made, jobs=2)
    return made, out


def test_every_cell_is_a_run_and_the_comparison_has_them_all(finished) -> None:
    _, out = finished
    found = json.loads((out / "compare.json").read_text())
    assert [(cell["criterion"], cell["seed"]) for cell in found["cells"]] == [
        ("l1", 0),
        ("random", 0),
    ]
    assert (found["failed"], found["missing"]) == ({}, [])
    for cell in found["cells"]:
        read = report.read(out / f"{cell['criterion']}-0.5-seed{cell['seed']}")
        assert cell["accuracy"] == read.pruned.accuracy
        assert read.settings["when"] == "during"  # for L1 too
        assert read.timings == ()
    assert {"compare.md", "compare.html"} <= {path.name for path in out.iterdir()}


def test_a_finished_cell_is_never_run_again(finished) -> None:
    made, out = finished
    before = times(out)
    result = run_grid(made)
    assert times(out) == before
    assert len(before) == len(result.comparison.cells) == 2


def test_the_dense_model_of_a_seed_is_trained_once_and_figures_are_the_same(finished, tmp_path: Path) -> None:
    made, out = finished
    name = "random-0.5-seed0"
    alone = dataclasses.replace(made.cells()[name], out=str(tmp_path / "alone"))
    expected = job.run(alone, timings=False)
    taken = job.run(
        dataclasses.replace(alone, out=str(tmp_path / "taken")), dense_from=out / "l1-0.5-seed0", timings=False
    )
    seen = report.read(out / name)
    for other in (taken, seen):
        assert (other.dense.accuracy, other.dense.loss) == (expected.dense.accuracy, expected.dense.loss)
        assert (other.pruned.accuracy, other.pruned.loss) == (expected.pruned.accuracy, expected.pruned.loss)
    # Its record of the dense epochs is that of the run it was taken from, to the time they took.
    dense = [[each for each in it.epochs if each.stage == "dense"] for it in (taken, report.read(out / "l1-0.5-seed0"))]
    assert dense[0] == dense[1]


def test_a_grid_grows_and_a_cell_of_another_grid_is_refused_before_anything_runs(finished) -> None:
    made, out = finished
    before = times(out)
    wider = dataclasses.replace(made, criteria=("l1", "random", "l2"))
    assert len(wider.cells()) == 3
    run_grid(dataclasses.replace(made, criteria=("l2",)), time_limit_s=0)  # what is there stays in the tables
    found = json.loads((out / "compare.json").read_text())
    assert [cell["criterion"] for cell in found["cells"]] == ["l1", "random"]
    with pytest.raises(
        RunFolderError, match=r"is the folder of a grid, and its comparison is .*compare.html: give the"
    ):
        report.read(out)
    assert (found["missing"], found["format"], found["version"]) == (["l2-0.5-seed0"], "compressor-comparison", 1)
    other = dataclasses.replace(made, options={**TINY, "epochs": 2})
    with pytest.raises(RunFolderError, match=r"cell l1-0.5-seed0 was written by another grid: .*--epochs 1, not 2"):
        run_grid(other)
    with pytest.raises(RunFolderError, match=r"cell l1-0.5-seed0 was written by another grid"):
        run_grid(dataclasses.replace(other, criteria=("l2",)))
    assert times(out) == before


def test_a_learning_rate_that_was_found_is_not_another_one(finished) -> None:
    made, out = finished
    searched = dataclasses.replace(made, options={**TINY, "lr": "auto"})
    run_grid(searched)  # nothing to run, nothing to refuse
    options = searched.cells()["l1-0.5-seed0"].given()
    assert options["lr"] == "auto"
    assert job.resumed(options).lr == job.read_toml(out / "l1-0.5-seed0" / "config.toml")["lr"]


@pytest.mark.parametrize(("asked", "threads"), [("", 4), ("1", 1), ("9", 4), ("2,1", 4), ("0", 4)])
def test_cells_take_no_more_threads_than_were_asked_for(asked: str, threads: int, monkeypatch) -> None:
    from compressor.job import grid as grids

    monkeypatch.setattr(grids, "describe_machine", lambda: {"cores": 4})
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert grids._threads() == threads


def test_shards_share_all_cells_and_no_cell_twice(tmp_path: Path, monkeypatch) -> None:
    from compressor.job import grid as grids

    begun: list[str] = []
    monkeypatch.setattr(grids._Pool, "start", lambda self, name: begun.append(name))
    wide = grid(tmp_path / "g", criteria=("l1", "l2", "random"), seeds=3)
    for number in (1, 2, 3, 4):
        run_grid(wide, shard=(number, 4), jobs=9)
    assert sorted(begun) == sorted(wide.cells())
    assert len(begun) == 9


@pytest.mark.slow
def test_a_failed_cell_says_why_stays_in_the_tables_and_is_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "g"
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of use")
    made = grid(out, options={**TINY, "weights": str(tmp_path / "broken.safetensors")}, criteria=("l1",), seeds=1)
    result = run_grid(made)
    assert result.comparison.cells == ()
    assert list(result.comparison.failed) == ["l1-0.5-seed0"]
    assert "broken.safetensors" in result.comparison.failed["l1-0.5-seed0"]
    assert "broken.safetensors" in (out / "compare.md").read_text()
    (tmp_path / "broken.safetensors").unlink()
    again = run_grid(made)
    assert "broken.safetensors" in again.comparison.failed["l1-0.5-seed0"]  # another reason by now
    assert again.comparison.failed != result.comparison.failed


COMMAND = [sys.executable, "-m", "compressor", "compare", "--model", "user_models:tiny", "--criteria", "l1,random"]


def compare(out: Path, *more: str) -> subprocess.Popen[str]:
    words = [*COMMAND, "--seeds", "1", "--out", str(out), "--epochs", "40", "--prune-every", "9", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=Path(__file__).parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def begun(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("*/metrics.jsonl"))


def wait_until_begun(out: Path) -> None:
    limit = time.monotonic() + 120
    while not begun(out) and time.monotonic() < limit:
        time.sleep(0.1)
    assert begun(out)


@pytest.mark.slow
def test_a_stopped_grid_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "g"
    process = compare(out)
    wait_until_begun(out)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped; go on with: compress compare --model user_models:tiny" in said
    (cell,) = begun(out)
    assert list((cell / "checkpoint").rglob("*"))
    assert not (cell / "report.json").exists()
    metrics = (cell / "metrics.jsonl").read_text()
    # The next call goes on with it: no epoch that was done is done again.
    process = compare(out, "--time-limit", "0.5")
    _, said = process.communicate(timeout=240)
    assert process.returncode in (0, 124), said
    assert (cell / "metrics.jsonl").read_text().startswith(metrics.splitlines()[0][:60])


def test_no_time_at_all_is_a_clean_end(tmp_path: Path) -> None:
    out = tmp_path / "g"
    process = compare(out, "--time-limit", "0")
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 124
    assert "0 of 2 runs finished" in printed
    assert "the time is over; go on with: compress compare" in said
    assert said.rstrip().endswith("--time-limit=0.0")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the child where Linux lists processes")
def test_a_killed_grid_takes_its_cells_along(tmp_path: Path) -> None:
    out = tmp_path / "g"
    process = compare(out)
    wait_until_begun(out)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    cells = [child for child in listed if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    assert cells
    process.kill()
    process.communicate()
    limit = time.monotonic() + 120
    while any(is_alive(child) for child in cells) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(is_alive(child) for child in cells)
    (cell,) = begun(out)
    assert list((cell / "checkpoint").rglob("state.pt"))  # asked to stop, it wrote one


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the child where Linux lists processes")
def test_a_cell_whose_process_is_killed_is_a_failure_and_the_others_run(tmp_path: Path) -> None:
    out = tmp_path / "g"
    process = compare(out, "--epochs", "1")
    limit = time.monotonic() + 120
    while not list(out.glob("l1*/.lock*")) and time.monotonic() < limit:
        time.sleep(0.05)
    for child in map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(child, signal.SIGKILL)
    printed, said = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert "l1-0.5-seed0 failed: its process ended with exit code -9" in said
    assert "1 of 2 runs finished, 1 failed" in printed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"criteria": ()}, InputError, "--criteria : give each value once"),
        ({"criteria": ("l1", "l1")}, InputError, "--criteria l1,l1: give each value once"),
        ({"criteria": ("l1", "relevanc")}, UnknownNameError, "unknown criterion 'relevanc': did you mean 'relevance'"),
        ({"sparsities": ()}, InputError, "--sparsity : give each value once"),
        ({"sparsities": (0.5, 1.5)}, RangeError, "sparsity = 1.5 is out of range"),
        ({"seeds": 0}, RangeError, "seeds = 0 is out of range"),
        ({"options": {**TINY, "drop": 0.1}}, InputError, "--drop has no effect with any of l1, random: leave it out"),
        ({"options": {**TINY, "weights": "gone.pt"}}, InputError, "--weights gone.pt: there is no such file"),
        ({"options": {**TINY, "epoch": 3}}, UnknownNameError, "unknown option 'epoch': did you mean 'epochs'"),
        ({"options": {**TINY, "when": "after"}}, InputError, "--prune-every has no effect with any of l1, random"),
        (
            {"criteria": ("l1", "rigl"), "options": {"model": "user_models:tiny", "when": "after"}},
            InputError,
            "rigl changes its masks in",
        ),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path: Path, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        grid(tmp_path / "g", **changes)
    assert message in str(caught.value)
    assert not (tmp_path / "g").exists()


def test_numbers_out_of_range_are_refused_at_once(tmp_path: Path) -> None:
    for how, message in (
        ({"jobs": 0}, "jobs = 0 is out of range"),
        ({"shard": (4, 3)}, "shard = 4/3 is out of range"),
        ({"shard": (0, 3)}, "shard = 0/3 is out of range"),
        ({"time_limit_s": -60.0}, "time-limit = -1.0 is out of range"),
    ):
        with pytest.raises(RangeError, match=message):
            run_grid(grid(tmp_path / "g"), **how)
    assert not (tmp_path / "g").exists()


def test_options_that_only_some_criteria_know_reach_those(tmp_path: Path) -> None:
    made = grid(tmp_path, criteria=("relevance", "l1", "rigl"), options={**TINY, "drop": 0.1, "compensate": "mean"})
    cells = made.cells()
    assert cells["relevance-0.5-seed0"].drop == 0.1
    assert cells["l1-0.5-seed0"].compensate == "mean"
    assert cells["rigl-0.5-seed0"].granularity == "weight"
    assert {each.when for each in cells.values()} == {"during"}


def test_a_dense_model_is_taken_from_a_cell_that_trains_alike_alone(tmp_path: Path) -> None:
    """An average of the weights is for criteria that cut while training: masks have none."""
    cells = grid(tmp_path, criteria=("relevance", "l1", "rigl"), options={**TINY, "ema": 0.9}, seeds=2).cells()
    first = cells["relevance-0.5-seed0"]
    alike = [name for name, each in cells.items() if grids._trains_alike(each, first)]
    assert alike == ["relevance-0.5-seed0", "l1-0.5-seed0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", "0.4,much"], "--sparsity 0.4,much: give numbers, separated by commas: 0.4,0.6"),
        (["--shard", "one"], "--shard one: give I/N, 1/3 say"),
        (["--seeds", "0"], "seeds = 0 is out of range"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: list[str], message: str) -> None:
    from typer.testing import CliRunner

    from compressor.cli import app

    result = CliRunner().invoke(app, ["compare", "--criteria", "l1", *words])
    assert result.exit_code == 2
    assert message in result.stderr
