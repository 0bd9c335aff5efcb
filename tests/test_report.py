"""The report: what is written is read back, the page stands alone, and its figures are the run's figures."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_report import epoch, sample, timing

from compressor import report as reports
from compressor.errors import ArtifactError, RunFolderError
from compressor.report import relevance_picture, tables
from compressor.report.document import ClassAccuracy, Cut, FrozenLayer, Goal, GroupRelevance, Layer, OwnMetric, Report
from compressor.report.markdown import markdown, relevance


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "report.html", "report.json", "report.md"]


def test_render_gives_what_write_gave(report: Report, tmp_path: Path) -> None:
    reports.write(report, tmp_path)
    before = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    reports.render(reports.read(tmp_path), tmp_path)
    assert (tmp_path / "report.html").read_text() == before


def test_folder_without_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no report\.json; give the folder of a finished run"):
        reports.read(tmp_path)


def change(content: Any, place: str, value: object) -> None:
    """Put a value at a place like `epochs.0.lr`; `...` removes what is there."""
    *way, last = (int(part) if part.isdigit() else part for part in place.split("."))
    for step in way:
        content = content[step]
    if value is ...:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format", "other", "is no report of compressor"),
        ("format", ..., "is no report of compressor"),
        ("version", 99, "has version 99, and this compressor reads version 1"),
        ("version", ..., "has version None"),
        ("goal", ..., "missing required field `goal`"),
        ("dense.accuracy", ..., r"missing required field `accuracy` - at `\$\.dense`"),
        ("machine", None, r"Expected `object`, got `null` - at `\$\.machine`"),
        ("machine", [], r"Expected `object`, got `array` - at `\$\.machine`"),
        ("name", 3, r"Expected `str`, got `int` - at `\$\.name`"),
        ("dense.params", "many", r"Expected `int`, got `str` - at `\$\.dense\.params`"),
        ("dense.params", 1.5, r"Expected `int`, got `float` - at `\$\.dense\.params`"),
        ("dense.params", True, r"Expected `int`, got `bool` - at `\$\.dense\.params`"),
        ("dense.params", None, r"Expected `int`, got `float` - at `\$\.dense\.params`"),
        ("dense.accuracy", "0.9", r"Expected `float`, got `str` - at `\$\.dense\.accuracy`"),
        ("pruned", None, r"Expected `object`, got `float` - at `\$\.pruned`"),
        ("layers", {}, r"Expected `array`, got `object` - at `\$\.layers`"),
        ("epochs.1", 5, r"Expected `object`, got `int` - at `\$\.epochs\[1\]`"),
        ("epochs.1.lr", [], r"Expected `float`, got `array` - at `\$\.epochs\[1\]\.lr`"),
        ("parity.0.providers.0", 5, r"Expected `str`, got `int` - at `\$\.parity\[0\]\.providers\[0\]`"),
        ("files.model", 0.5, r"Expected `int`, got `float` - at `\$\.files\[\.\.\.\]`"),
        ("later", 5, r"unknown field - at `\$\.later`"),
        ("dense.f1", 0.5, r"unknown field - at `\$\.dense\.f1`"),
        ("timings.1.p95_ms", 0.5, r"unknown field - at `\$\.timings\[1\]\.p95_ms`"),
    ],
)
def test_a_report_with_a_wrong_field_is_refused(report: Report, place: str, value: object, message: str) -> None:
    content = json.loads(reports.to_json(report))
    change(content, place, value)
    with pytest.raises(ArtifactError, match=rf"^runs/demo/report\.json .*{message}"):
        reports.from_json(json.dumps(content), "runs/demo/report.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "is no JSON"),
        (lambda data: b"", "is no JSON"),
        (lambda data: b"[1, 2]", "is no report of compressor"),
        (lambda data: b"null", "is no report of compressor"),
        (lambda data: data.replace(b"demo", b"d\xe9mo"), "is no JSON"),
        (lambda data: data.decode().encode("utf-16"), "is no JSON"),
        (lambda data: data.replace(b": 0.98", b": NaN"), "is no JSON"),
        (lambda data: b"[" * 100_000, "is no JSON"),
        (lambda data: data.replace(b'"blocked": []', b'"blocked": ' + b"[" * 900 + b"]" * 900), "is damaged"),
    ],
)
def test_a_file_that_is_no_report_is_refused(
    report: Report, tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    reports.write(report, tmp_path)
    path = tmp_path / "report.json"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ArtifactError, match=message) as caught:
        reports.read(tmp_path)
    assert str(caught.value).startswith(str(path))


def test_settings_and_machine_may_hold_null_and_whatever_json_can_say(report: Report) -> None:
    machine = {"gpu": None, "cores": 2, "nested": {"list": [1, None, "x"]}}
    free = dataclasses.replace(report, machine=machine, settings={"finetune-epochs": None, "keep": ["a", "b"]})
    assert reports.from_json(reports.to_json(free), "report.json") == free


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
    assert page.tags.count("svg") == 5


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


def cut_places(text: str) -> list[float]:
    return [float(place) for place in re.findall(r'class="cut" x1="([\d.]+)"', text)]


def test_a_cut_stands_where_its_step_is(report: Report) -> None:
    text = reports.html(report)
    # 10 steps an epoch, 3 epochs over 692 pixels from 56 on: step 15 is half the way
    assert cut_places(text)[0] == 56 + 692 / 2


def test_models_that_part_after_a_shared_stage_go_on_from_its_end(report: Report) -> None:
    shared = (*(epoch("train", n) for n in (1, 2)), epoch("dense", 1), epoch("pruned", 1))
    parted = dataclasses.replace(report, epochs=shared, cuts=(Cut("pruned", 0, 20, 4_000),))
    text = reports.html(parted)
    assert "before the cut" in text
    assert cut_places(text)[0] == pytest.approx(56 + 692 * 2 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("empty", "gone", "stays"),
    [
        ({"epochs": (), "cuts": (), "timings": ()}, ("<circle", 'class="cut"'), "64 → 32"),
        ({"layers": ()}, ("64 → 32",), "torch, batch 1"),
        ({"timings": ()}, ("torch, batch 1", "as fast at p50", "whisker"), "64 → 32"),
        ({"frozen": ()}, ("reaches the output",), "and why (0)"),
        ({"notes": ()}, ("ran on one core", "<h2>Notes"), "64 → 32"),
    ],
)
def test_page_leaves_out_what_is_missing_and_nothing_else(
    report: Report, empty: dict, gone: tuple[str, ...], stays: str
) -> None:
    whole, text = (html_without_style(each) for each in (report, dataclasses.replace(report, **empty)))
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 5 - ("timings" in empty)  # of which there are two pictures, and the first says so
    assert all(words in whole and words not in text for words in gone)
    assert stays in text


def html_without_style(report: Report) -> str:
    return re.sub("<style>.*?</style>", "", reports.html(report), flags=re.DOTALL)


def test_comparison_has_a_line_for_each_place(report: Report) -> None:
    timings = [timing(model, size, p50, backend) for backend in ("torch", "onnxruntime") for size in (1, 32)
               for model, p50 in (("dense", 4.0), ("pruned", 1.0))]  # fmt: skip
    rows = tables.comparison(dataclasses.replace(report, timings=tuple(timings)))
    latency = [row for row in rows if "p50" in row.label]
    assert [row.label for row in latency] == [
        "torch, batch 1: p50/p90 ms",
        "torch, batch 32: p50/p90 ms",
        "onnxruntime, batch 1: p50/p90 ms",
        "onnxruntime, batch 32: p50/p90 ms",
    ]
    assert {row.change for row in latency} == {"4.00× as fast (4.00 to 4.00)"}
    assert {(row.dense, row.pruned) for row in latency} == {("4.00/4.80", "1.00/1.20")}


def test_summary_says_when_the_target_was_missed(report: Report) -> None:
    missed = dataclasses.replace(report, goal=Goal("params", 0.6, 0.5, ("conv1 is at its floor",), met=False))
    assert "not reached" not in tables.summary(report)
    assert "50.0% of the params removed, 60.0% asked (not reached)" in tables.summary(missed)
    assert "conv1 is at its floor" in reports.html(missed)


def test_markdown_is_a_table_of_equal_rows(report: Report) -> None:
    text = markdown(dataclasses.replace(report, layers=(Layer("a|b", 4, 2),)))
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


def test_relevance_is_drawn_channel_by_channel_on_the_scale_of_the_dummies(report: Report) -> None:
    drawn = str(relevance_picture.relevance(report.relevance))
    strokes = re.findall(r'<path class="(\w+)" d="([^"]*)"', drawn)
    assert [(kind, steps.count("M")) for kind, steps in strokes] == [("train", 2), ("pruned", 2), ("train", 2)]
    places = [float(x) for x in re.findall(r"M([\d.]+) ", strokes[1][1])]
    assert places == sorted(places)
    low, high = math.asinh(-3.0), math.asinh(40.0)  # the extremes of all groups are the ends of the scale
    left, right = 230, relevance_picture.WIDTH - 90
    assert places[0] == pytest.approx(left + (math.asinh(7.5) - low) / (high - low) * (right - left), abs=0.06)
    assert places[1] == right
    assert "conv1: 2 of 4 channels are above chance, 2 cannot be told from it" in drawn
    assert "correlation of 0.20" in drawn
    assert relevance(report) == [("conv1", "4", "2", "2", "0.91"), ("layer1.0", "2", "0", "1", "0.20")]
    assert "Relevance beside channels of no effect" in reports.html(report)
    assert "## Relevance" in markdown(report)
    without = dataclasses.replace(report, relevance=())
    assert "Relevance beside" not in reports.html(without)
    assert "## Relevance" not in markdown(without)


def test_a_group_whose_dummies_do_not_spread_is_left_empty() -> None:
    drawn = str(relevance_picture.relevance([GroupRelevance("a", (math.nan, 1.0), (False, True), 0, math.nan)]))
    assert "nan" not in re.sub(r"<title>.*?</title>", "", drawn)
    assert drawn.count("M") == 1


def test_classes_that_lost_most_come_first_and_a_thousand_do_not_fill_the_page(report: Report) -> None:
    assert tables.classes(report) == [
        ("dog", "249", "99.0%", "96.0%", "-3.0 points"),
        ("cat", "200", "97.0%", "98.0%", "+1.0 points"),
    ]
    many = tuple(ClassAccuracy(f"class {n}", 50, 0.9, 0.9 - n / 10_000) for n in range(1000))
    rows = tables.classes(dataclasses.replace(report, classes=many))
    assert [row[0] for row in rows[:2]] == ["class 999", "class 998"]
    assert rows[-1][0] == "970 more in report.json"
    assert len(rows) == tables.MOST_CLASSES + 1


@pytest.mark.parametrize(
    ("dense", "pruned", "higher", "change"),
    [
        (0.5, 0.6, True, "+0.1 (better)"),
        (0.5, 0.4, True, "-0.1 (worse)"),
        (2.0, 3.0, False, "+1 (worse)"),
        (1, 1, True, "+0"),
    ],
)
def test_the_change_of_a_metric_says_whether_it_is_better(
    report: Report, dense: float, pruned: float, higher: bool, change: str
) -> None:
    made = dataclasses.replace(report, metrics=(OwnMetric("iou", dense, pruned, higher),))
    assert tables.comparison(made)[1] == tables.Row("iou", f"{dense:.4g}", f"{pruned:.4g}", change)
    assert "| iou |" in markdown(made)
    assert "iou" in reports.html(made)
