"""Several runs side by side: the front against its definition, what is refused, and the pages."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_report import sample, timing
from typer.testing import CliRunner

from compressor.cli import app
from compressor.errors import InputError
from compressor.report import Report, side_by_side
from compressor.report.pages import write as write_run

PLACE = "torch, cpu, batch 1"


def run(name: str, criterion: str = "l1", *, accuracy: float = 0.97, macs: int = 100_000, ms: float = 1.5) -> Report:
    base = sample()
    return dataclasses.replace(
        base,
        name=name,
        settings={**base.settings, "criterion": criterion},
        pruned=dataclasses.replace(base.pruned, accuracy=accuracy, macs=macs),
        timings=(timing("dense", p50_ms=3.0), timing("pruned", p50_ms=ms)),
    )


def model(name: str, accuracy: float, macs: int) -> side_by_side.Model:
    return side_by_side.Model(name, "l1", accuracy, 1, macs, {})


def test_the_worked_example() -> None:
    a, b, c, d = model("a", 0.91, 100), model("b", 0.90, 50), model("c", 0.89, 60), model("d", 0.90, 50)
    assert side_by_side.front([a, b, c, d], "MACs") == [b, d, a]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=20))
def test_off_the_front_is_what_another_one_beats(points: list[tuple[int, int]]) -> None:
    found = [model(str(index), accuracy / 20, macs) for index, (accuracy, macs) in enumerate(points)]
    front = side_by_side.front(found, "MACs")
    assert [each.macs for each in front] == sorted(each.macs for each in front)
    for each in found:
        # The oracle: the best accuracy that its MACs buy, and nothing cheaper gives as much.
        affordable = [other.accuracy for other in found if other.macs <= each.macs]
        cheaper = [other.accuracy for other in found if other.macs < each.macs]
        is_best = each.accuracy == max(affordable) and each.accuracy > max(cheaper, default=-1.0)
        assert (each in front) == is_best


def test_one_dense_model_is_shown_once() -> None:
    found = side_by_side.models([run("a"), run("b", "random", accuracy=0.95)])
    assert [(each.name, each.criterion) for each in found] == [("a (dense)", "dense"), ("a", "l1"), ("b", "random")]
    assert found[1].latency_ms == {PLACE: 1.5}
    assert side_by_side.measures(found) == [PLACE, "MACs", "params"]


def test_a_place_where_a_run_was_not_timed_is_left_out() -> None:
    untimed = dataclasses.replace(run("b"), timings=())
    assert side_by_side.measures(side_by_side.models([run("a"), untimed])) == ["MACs", "params"]
    assert math.isnan(side_by_side.models([untimed])[0].cost(PLACE))


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (run("a"), "a is given twice"),
        (dataclasses.replace(run("b"), settings={"data": "cifar10"}), "different test images cannot be compared"),
    ],
)
def test_what_cannot_be_compared_is_refused(second: Report, says: str) -> None:
    with pytest.raises(InputError, match=says):
        side_by_side.models([run("a"), second])


def test_a_dense_model_that_drifted_is_said() -> None:
    slower = dataclasses.replace(run("b"), timings=(timing("dense", p50_ms=3.3), timing("pruned")))
    assert side_by_side.warnings([run("a"), run("b")]) == []
    (said,) = side_by_side.warnings([run("a"), slower])
    assert "the same dense model took 3.00 to 3.30 ms" in said
    elsewhere = dataclasses.replace(run("b"), machine={"cpu": "another"})
    assert side_by_side.warnings([run("a"), elsewhere]) == [
        "the runs were timed on different processors: a processor, another"
    ]


def test_the_command_writes_three_files_that_say_the_same(tmp_path: Path) -> None:
    for index, name in enumerate(("one/demo", "two/demo")):
        (tmp_path / name).mkdir(parents=True)
        write_run(run("demo", accuracy=0.97 - 0.01 * index, ms=1.5 - 0.5 * index), tmp_path / name)
    runs = [str(tmp_path / "one/demo"), str(tmp_path / "two/demo")]
    done = CliRunner().invoke(app, ["report", *runs, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out/runs.json").read_text(encoding="utf-8"))
    assert (content["format"], content["version"]) == ("compressor-runs", 1)
    # The second is faster and less accurate than the first: both are best at something, as is the dense model.
    assert content["fronts"][PLACE] == [runs[1], runs[0], f"{runs[0]} (dense)"]
    page = (tmp_path / "out/runs.html").read_text(encoding="utf-8")
    table = (tmp_path / "out/runs.md").read_text(encoding="utf-8")
    for text in (page, table):
        assert runs[0] in text
        assert "97.00" in text
    assert "<script" not in page
    assert f"{runs[1]}: 96.00%, 1.00 ms ({PLACE})" in page


def test_out_of_one_run_has_no_effect_and_is_refused(tmp_path: Path) -> None:
    write_run(sample(), tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "--out has no effect" in done.output
