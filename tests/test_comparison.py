"""The comparison of a grid: its statistics against values worked out by hand, and its pages."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_report import sample

from compressor.report.comparison import (
    HEAD,
    Cell,
    Comparison,
    html,
    markdown,
    paired_difference,
    progress,
    rows,
    summaries,
    write,
)
from compressor.report.comparison_picture import draw_comparison


def cell(criterion: str, seed: int, accuracy: float, sparsity: float = 0.5, *, reached: bool = True) -> Cell:
    return Cell(criterion, sparsity, seed, accuracy, 0.9 + 0.01 * seed, (100, 40), (1000, 450), 12.0, reached)


CELLS = (
    cell("ours", 0, 0.80), cell("ours", 1, 0.82), cell("ours", 2, 0.84),
    cell("random", 0, 0.79), cell("random", 1, 0.80), cell("random", 3, 0.50),
    cell("l1", 2, 0.83), cell("ours", 0, 0.6, 0.7, reached=False),
)  # fmt: skip


def test_means_and_paired_differences() -> None:
    ours, random, l1, sparser = summaries(CELLS)
    assert (ours.criterion, ours.sparsity, ours.n) == ("ours", 0.5, 3)
    assert (ours.accuracy, ours.sd) == (pytest.approx(0.82), pytest.approx(0.02))
    assert (ours.lowest, ours.highest, ours.params, ours.macs) == (0.80, 0.84, 0.4, 0.45)
    # Seeds 0 and 1 are of both: 0.01 and 0.02. t(0.975, 1) = 12.706, sd 0.0070711, over the root of 2.
    assert ours.against["random"].n == 2
    assert ours.against["random"].mean == pytest.approx(0.015)
    assert ours.against["random"].half == pytest.approx(12.7062 * 0.00707107 / math.sqrt(2), rel=1e-4)
    assert ours.against["l1"].mean == pytest.approx(0.01)
    assert math.isnan(ours.against["l1"].half)  # of one pair
    assert set(random.against) == set()  # no seed is of both it and l1
    assert set(l1.against) == set()
    assert (sparser.sparsity, sparser.against, sparser.unreached) == (0.7, {}, 1)


@given(values=st.lists(st.floats(-1, 1), min_size=2, max_size=12), shift=st.floats(-1, 1))
def test_an_interval_moves_with_its_values_and_turns_with_their_sign(values: list[float], shift: float) -> None:
    plain, moved = paired_difference(values), paired_difference([value + shift for value in values])
    turned = paired_difference([-value for value in values])
    assert moved.mean == pytest.approx(plain.mean + shift, abs=1e-12)
    assert moved.half == pytest.approx(plain.half, abs=1e-9)
    assert (turned.mean, turned.half) == (pytest.approx(-plain.mean, abs=1e-12), pytest.approx(plain.half))


def test_the_interval_holds_the_truth_in_95_of_100_experiments() -> None:
    import numpy as np

    dice = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        found = paired_difference(list(dice.normal(0.3, 1.0, size=4)))
        inside += abs(found.mean - 0.3) <= found.half
    assert 0.935 < inside / 2000 < 0.965


COMPARISON = Comparison("study", "compress compare ...", CELLS, {"set-0.5-seed0": "<no> room"}, ("l1-0.5-seed0",))


def test_the_table_says_what_is_known_and_what_is_not() -> None:
    table = rows(COMPARISON)
    assert all(len(row) == len(HEAD) for row in table)
    assert table[0] == ("ours", "0.5", "82.00", "2.00", "3", "40.0%", "45.0%", "12", "+1.50 ± 6.35", "+1.00")
    assert table[3][:4] == ("ours", "0.7 (not reached)", "60.00", "")
    assert progress(COMPARISON) == "8 of 10 runs finished, 1 failed; dense: 91.50 %"
    assert progress(Comparison("x", "", ())) == "0 of 0 runs finished"


def test_pages_hold_it_all_and_escape_it(tmp_path: Path) -> None:
    write(COMPARISON, tmp_path)
    text, page = markdown(COMPARISON), html(COMPARISON)
    assert "- set-0.5-seed0: <no> room" in text
    assert "&lt;no&gt; room" in page
    assert "<no>" not in page
    assert "http" not in page
    assert (tmp_path / "compare.md").read_text() == text
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [each["accuracy"] for each in found["cells"]] == [each.accuracy for each in CELLS]
    assert found["summaries"][0]["against"]["random"]["n"] == 2


def test_the_picture_has_a_line_for_each_criterion_and_a_dot_for_each_mean() -> None:
    points = [
        (each.criterion, each.sparsity, each.accuracy, each.lowest, each.highest, each.n) for each in summaries(CELLS)
    ]
    tree = ElementTree.fromstring(draw_comparison(points, [0.9, 0.92]))
    assert len([each for each in tree.iter() if each.tag == "polyline"]) == 3
    assert len(list(tree.iter("g"))) == 4
    titles = [each.text for each in tree.iter("title")]
    assert "ours, 0.5 removed: 82.00% (80.00% to 84.00%, 3 runs)" in titles
    heights = {title: float(g.find("circle").get("cy")) for g in tree.iter("g") for title in [g.find("title").text]}
    ordered = sorted(heights, key=lambda title: -heights[title])  # low accuracies are far down
    assert [title.split(",")[0] for title in ordered] == ["ours", "random", "ours", "l1"]
    assert "no run is finished yet" in draw_comparison([], [])


def test_a_cell_is_read_from_the_report_of_a_run() -> None:
    made = dataclasses.replace(sample(), settings={"criterion": "l1", "sparsity": 0.6, "seed": 3})
    found = Cell.from_report(made)
    assert (found.criterion, found.sparsity, found.seed) == ("l1", 0.6, 3)
    assert (found.accuracy, found.dense_accuracy) == (made.pruned.accuracy, made.dense.accuracy)
    assert found.seconds == sum(each.seconds for each in made.epochs if each.stage == "pruned")


def test_the_page_says_one_accuracy_of_the_dense_model() -> None:
    """Of seeds 0 to 3, once each: 0.90 to 0.93, however many criteria a seed has."""
    page = html(Comparison("grid", "compress compare", CELLS))
    assert "dense: 91.50 %" in page
    assert "dense 91.50<" in page
