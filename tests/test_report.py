"""The report: what is written is read back, the page stands alone, and its figures are the run's figures."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_report import epoch, sample, timing

from compressor import report as reports
from compressor.errors import ArtifactError, RunFolderError
from compressor.report import tables
from compressor.report.document import Cut, FrozenLayer, Goal, Layer, Report


@pytest.fixture
def report() -> Report:
    return sample()


def test_json_gives_back_the_same_report(report: Report) -> None:
    assert reports.from_json(reports.to_json(report), "report.json") == report


def test_json_names_its_format_and_version_first(report: Report) -> None:
    assert list(json.loads(reports.to_json(report)))[:2] == ["format", "version"]


def test_json_says_null_for_what_is_no_number_and_reads_nan_back(report: Report) -> None:
    diverged = dataclasses.replace(report, epochs=(epoch("dense", 1, train_loss=math.nan, validation_loss=math.inf),))
    text = reports.to_json(diverged)
    assert "NaN" not in text
    assert "Infinity" not in text
    back = reports.from_json(text, "report.json").epochs[0]
    assert math.isnan(back.train_loss)
    assert math.isnan(back.validation_loss)


def test_folder_gives_back_the_same_report_and_no_half_written_file(report: Report, tmp_path: Path) -> None:
    reports.write(report, tmp_path)
    assert reports.read(tmp_path) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_render_gives_what_write_gave(report: Report, tmp_path: Path) -> None:
    reports.write(report, tmp_path)
    before = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    reports.render(reports.read(tmp_path), tmp_path)
    assert (tmp_path / "report.html").read_text() == before


def test_folder_without_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no report\.json; give the folder of a finished run"):
        reports.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no JSON"),
        (lambda text: "[1, 2]", "is no report of compressor"),
        (lambda text: text.replace('"compressor-report"', '"other"'), "is no report of compressor"),
        (
            lambda text: text.replace('"version": 1', '"version": 99'),
            "has version 99, and this compressor reads version 1",
        ),
        (lambda text: text.replace('"accuracy"', '"acuracy"', 1), "is damaged"),
        (lambda text: text.replace('"goal"', '"gaol"'), "is damaged"),
        (lambda text: text.replace('"machine"', '"machines"'), "is damaged"),
    ],
)
def test_damaged_report_is_refused(report: Report, change, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        reports.from_json(change(reports.to_json(report)), "runs/demo/report.json")


class Page(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "data", "srcset", "action"}]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_loads_nothing_and_runs_nothing(report: Report) -> None:
    text = reports.html(report)
    page = Page(text)
    assert page.loads == []
    assert {"script", "link", "iframe", "img", "object"} & set(page.tags) == set()
    assert re.findall(r"https?:|@import|url\(", text) == []


def test_page_closes_every_tag_it_opens(report: Report) -> None:
    page = Page(reports.html(report))
    assert page.open == []
    assert page.tags.count("svg") == 3


def test_page_is_small(report: Report) -> None:
    layers = tuple(Layer(f"features.{n}.conv", 512, 256) for n in range(300))
    assert len(reports.html(dataclasses.replace(report, layers=layers))) < 300_000


def test_page_shows_the_figures(report: Report) -> None:
    text = reports.html(report)
    for shown in (
        "98.00%",
        "97.00%",
        "-60.0%",
        "2.00×",
        "64 → 32",
        "reaches the output",
        report.command,
        "ran on one core",
    ):
        assert shown in text


def test_page_escapes_what_it_is_given(report: Report) -> None:
    hostile = '<script>alert("x")</script>'
    text = reports.html(
        dataclasses.replace(
            report,
            name=hostile,
            command=hostile,
            layers=(Layer(hostile, 2, 1),),
            frozen=(FrozenLayer(hostile, 0, hostile, 1),),
            timings=(timing("dense", backend=hostile), timing("pruned", backend=hostile)),
            notes=(hostile,),
        )
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 7


def test_every_cut_is_marked_in_both_panels(report: Report) -> None:
    assert reports.html(report).count('class="cut"') == 2 * len(report.cuts)


def test_a_cut_stands_where_its_step_is(report: Report) -> None:
    text = reports.html(report)
    # 10 steps an epoch, 3 epochs over 692 pixels from 56 on: step 15 is half the way
    assert re.findall(r'class="cut" x1="([\d.]+)"', text)[0] == f"{56 + 692 / 2:.1f}"


def test_models_that_part_after_a_shared_stage_go_on_from_its_end(report: Report) -> None:
    shared = (*(epoch("train", n) for n in (1, 2)), epoch("dense", 1), epoch("pruned", 1))
    parted = dataclasses.replace(report, epochs=shared, cuts=(Cut("pruned", 0, 20, 4_000),))
    text = reports.html(parted)
    assert "before the cut" in text
    assert re.findall(r'class="cut" x1="([\d.]+)"', text)[0] == f"{56 + 692 * 2 / 3:.1f}"


@pytest.mark.parametrize("empty", [{"epochs": (), "cuts": ()}, {"layers": ()}, {"timings": ()}, {"frozen": ()}])
def test_page_bears_what_is_missing(report: Report, empty: dict) -> None:
    Page(reports.html(dataclasses.replace(report, **empty)))


def test_comparison_has_a_line_for_each_place(report: Report) -> None:
    timings = [timing(model, size, p50, backend) for backend in ("torch", "onnxruntime") for size in (1, 32)
               for model, p50 in (("dense", 4.0), ("pruned", 1.0))]  # fmt: skip
    rows = tables.comparison(dataclasses.replace(report, timings=tuple(timings)))
    latency = [row for row in rows if "batch" in row.label]
    assert [row.label for row in latency] == [
        "torch, batch 1: p50/p90 ms",
        "torch, batch 32: p50/p90 ms",
        "onnxruntime, batch 1: p50/p90 ms",
        "onnxruntime, batch 32: p50/p90 ms",
    ]
    assert {row.change for row in latency} == {"4.00× as fast"}
    assert {(row.dense, row.pruned) for row in latency} == {("4.00/4.80", "1.00/1.20")}


def test_summary_says_when_the_target_was_missed(report: Report) -> None:
    missed = dataclasses.replace(report, goal=Goal("params", 0.6, 0.5, ("conv1 is at its floor",)))
    assert "not reached" not in tables.summary(report)
    assert "50.0% of the params removed, 60.0% asked (not reached)" in tables.summary(missed)
    assert "conv1 is at its floor" in reports.html(missed)


def test_markdown_is_a_table_of_equal_rows(report: Report) -> None:
    text = tables.markdown(dataclasses.replace(report, layers=(Layer("a|b", 4, 2),)))
    assert "a\\|b" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.00 k"),
        (11_181_642, "11.2 M"),
        (999_600, "1.00 M"),
        (15_480_000_000, "15.5 G"),
    ],
)
def test_counts_have_three_digits(number: int, shown: str) -> None:
    assert tables.count(number) == shown


@pytest.mark.parametrize(("size_bytes", "shown"), [(12, "12 B"), (1_500, "1.50 kB"), (44_780_000, "44.8 MB")])
def test_sizes_have_three_digits(size_bytes: int, shown: str) -> None:
    assert tables.size(size_bytes) == shown


@given(st.floats(min_value=1e-2, max_value=1e5))
def test_milliseconds_stay_within_half_a_percent(value_ms: float) -> None:
    assert abs(float(tables.milliseconds(value_ms)) / value_ms - 1) <= 0.0051
