"""The picture of a channel graph: everything is in it, in one colour a group, and it opens in a browser."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
import user_models
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import compressor
from compressor.cli import app
from compressor.graph import ChannelGraph
from compressor.report.graph_layout import Node, Stripe, Wire, blocks, nodes, wires
from compressor.report.graph_picture import draw_graph
from compressor.report.graph_style import colours

SVG = "{http://www.w3.org/2000/svg}"
FROZEN = "#b4b4b4"
ZOO = ["resnet18", "vgg11_bn", "densenet121", "shufflenet_v2_x0_5", "mobilenet_v2", "vit_b_16"]


class Stuck(nn.Module):
    """Two convolutions between which channels are sorted: nothing can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).sort(1).values)


class Shapes(nn.Module):
    """What torchvision's classifiers lack: transposed convolutions, and parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.ConvTranspose2d(3, 6, 2, bias=False), nn.ConvTranspose2d(6, 5, 1)
        self.place = nn.Parameter(torch.zeros(1, 6, 1, 1))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(x) + self.place) * self.scale


OWN = {"everything frozen": Stuck, "odd shapes": Shapes, "no weight": nn.ReLU, "tiny": lambda: user_models.tiny(10)}


@cache
def graph_of(name: str) -> ChannelGraph:
    model = OWN[name]() if name in OWN else torchvision.models.get_model(name)
    return compressor.trace(model, torch.zeros(1, 3, 224, 224))


every_model = pytest.mark.parametrize("name", [*ZOO, *OWN])


def titles(picture: str) -> list[str]:
    return [title.text or "" for title in ET.fromstring(picture).iter(f"{SVG}title")]


def fills(picture: str, group: str) -> set[str]:
    """Every colour in which something stands whose hover text begins with this group, in a plain form."""
    hatched = {f"url(#{p.get('id')})": p[0].get("fill") for p in ET.fromstring(picture).iter(f"{SVG}pattern")}
    found = set()
    for parent in ET.fromstring(picture).iter():
        title = parent.find(f"{SVG}title")
        if title is None or (title.text or "").split("\n")[0] != group:
            continue
        marks = [parent] if parent.tag == f"{SVG}path" else parent.findall(f"{SVG}rect")
        painted = {mark.get("fill") for mark in marks} | {mark.get("stroke") for mark in marks}
        found |= {hatched.get(colour, colour) for colour in painted - {None, "none"}}
    return found


@every_model
def test_the_picture_is_one_svg_with_its_own_background_and_below_a_megabyte(name: str) -> None:
    picture = draw_graph(graph_of(name))
    root = ET.fromstring(picture)
    assert root.tag == f"{SVG}svg"
    assert (root[0].tag, root[0].get("fill")) == (f"{SVG}rect", "#ffffff")
    assert (root[0].get("width"), root[0].get("height")) == (root.get("width"), root.get("height"))
    assert not {element.tag for element in root.iter()} & {f"{SVG}script", f"{SVG}style", f"{SVG}image"}
    assert len(picture.encode()) < 1_000_000


def test_even_densenet201_stays_below_a_megabyte() -> None:
    assert len(draw_graph(graph_of("densenet201")).encode()) < 1_000_000


@every_model
def test_no_mark_lies_outside_the_picture(name: str) -> None:
    root = ET.fromstring(draw_graph(graph_of(name)))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for rect in (rect for rect in root.iter(f"{SVG}rect") if rect.get("x")):
        x, y, w, h = (float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


@every_model
def test_the_legend_names_every_group_with_its_size(name: str) -> None:
    graph = graph_of(name)
    lines = [[t.text for t in g.findall(f"{SVG}text")] for g in ET.fromstring(draw_graph(graph)).iter(f"{SVG}g")]
    shown = {(line[0], line[1], line[2]) for line in lines if len(line) == 5}
    assert shown == {(g.name, str(g.size), "yes" if g.exact else "no") for g in graph.groups}


@every_model
def test_every_weight_has_one_box_and_every_frozen_dimension_its_reason(name: str) -> None:
    graph = graph_of(name)
    hints = "\n".join(titles(draw_graph(graph))).splitlines()
    lists = [line.removeprefix("tensors: ") for line in hints if line.startswith("tensors: ")]
    drawn = [tensor for each in lists for tensor in each.split(", ")]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) >= {member.tensor for group in graph.groups for member in group.members}
    assert set(drawn) >= {tensor for tensor, _ in graph.model.named_parameters()}
    frozen = {line for line in hints if " is frozen: " in line}
    assert frozen == {f"{each.tensor} dimension {each.dim} is frozen: {each.reason}" for each in graph.frozen}


@every_model
def test_a_group_has_one_colour_everywhere_and_no_other_group_has_it(name: str) -> None:
    graph = graph_of(name)
    picture = draw_graph(graph)
    painted = {group.name: fills(picture, group.name) for group in graph.groups}
    assert all(len(found) == 1 for found in painted.values()), painted
    distinct = {next(iter(found)) for found in painted.values()}
    assert len(distinct) == len(graph.groups)
    assert FROZEN not in distinct


@every_model
def test_a_group_has_one_stripe_on_every_side_on_which_it_lives(name: str) -> None:
    graph = graph_of(name)
    expected = Counter(s.group or "frozen" for row in nodes(graph) for s in row.outputs)
    expected += Counter(s.group or "frozen" for row in nodes(graph) if not row.slim for s in row.inputs)
    paths = ET.fromstring(draw_graph(graph)).iter(f"{SVG}path")
    drawn = {p[0].text: (p.get("d") or "").count("z") for p in paths if len(p) and p.get("stroke") is None}
    assert drawn == expected


def test_inexact_groups_are_hatched_and_dashed_and_only_they() -> None:
    graph = graph_of("vit_b_16")
    picture = draw_graph(graph)
    inexact = [group.name for group in graph.groups if not group.exact]
    assert 0 < len(inexact) < len(graph.groups)
    dashed = [path for path in ET.fromstring(picture).iter(f"{SVG}path") if path.get("stroke-dasharray")]
    assert sorted(path[0].text or "" for path in dashed) == sorted(inexact)
    assert len(re.findall("<pattern", picture)) == len(inexact)
    assert "not exact" in picture
    assert "not exact" not in draw_graph(graph_of("resnet18"))


def test_the_same_model_gives_the_same_text() -> None:
    first, second = (draw_graph(compressor.trace(user_models.tiny(10), torch.zeros(1, 3, 32, 32))) for _ in "ab")
    assert first == second


# -- the layout


def test_the_first_rows_of_resnet18() -> None:
    rows = nodes(graph_of("resnet18"))
    whole = (Stripe("conv1", 64),)
    assert [(row.name, row.shape, row.inputs, row.outputs, row.slim) for row in rows[:3]] == [
        ("conv1", (64, 3, 7, 7), (Stripe(None, 3),), whole, False),
        ("bn1", (64,), whole, whole, True),
        ("layer1.0.conv1", (64, 64, 3, 3), whole, (Stripe("layer1.0.conv1", 64),), False),
    ]
    assert rows[1].tensors == ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    assert blocks(rows) == [
        ("conv1", 1), ("bn1", 1), ("layer1", 8), ("layer2", 10), ("layer3", 10), ("layer4", 10), ("fc", 1),
    ]  # fmt: skip


def test_a_concatenation_is_stripes_in_order() -> None:
    (row,) = (row for row in nodes(graph_of("densenet121")) if row.name == "features.denseblock1.denselayer3.conv1")
    first, second = (f"features.denseblock1.denselayer{n}.conv2" for n in (1, 2))
    assert row.inputs == (Stripe("features.conv0", 64), Stripe(first, 32), Stripe(second, 32))


def test_sides_follow_the_roles_and_not_the_order_of_dimensions() -> None:
    up, place, out = sorted(nodes(graph_of("odd shapes")), key=lambda row: "up place out".index(row.name))
    assert (up.inputs, up.outputs) == ((Stripe(None, 3),), (Stripe("up", 6),))
    assert (place.inputs, place.outputs) == ((Stripe("up", 6),), (Stripe("up", 6),))
    assert (out.inputs, out.outputs) == ((Stripe("up", 6),), (Stripe(None, 5),))
    assert (place.tensors, out.tensors) == (("place", "scale"), ("out.weight", "out.bias"))


def test_vectors_of_other_channels_have_rows_of_their_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 5)
            self.c = nn.Linear(5, 2)
            self.first, self.second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x) * self.first) * self.second)

    rows = nodes(compressor.trace(Scaled(), torch.zeros(1, 3)))
    assert {row.name: (row.outputs, row.slim) for row in rows if row.slim} == {
        "first": ((Stripe("a", 4),), True),
        "second": ((Stripe("b", 5),), True),
    }


def test_stripes_share_out_whole_dimensions() -> None:
    graph = graph_of("shufflenet_v2_x0_5")
    lives = {(m.tensor, m.dim, g.name): m.positions.numel() for g in graph.groups for m in g.members}
    for row in nodes(graph):
        passing = len(row.shape) == 1 or row.shape[1] == 1  # BatchNorm and depthwise convolutions: one dimension
        for stripes, dim in ((row.outputs, 0), (row.inputs, 0 if passing else 1)):
            assert sum(stripe.share for stripe in stripes) == row.shape[dim]
            shares = {stripe.group: stripe.share for stripe in stripes if stripe.group}
            assert shares == {name: n for (tensor, d, name), n in lives.items() if (tensor, d) == (row.tensors[0], dim)}


def rows_of(plan: list[tuple[list[int], list[int]]]) -> list[Node]:
    sides = [[tuple(Stripe(f"g{n}", 1) for n in sorted(set(side))) for side in row] for row in plan]
    return [Node(f"n{i}", (1, 1), (), taken, made, False, ()) for i, (taken, made) in enumerate(sides)]


some_groups = st.lists(st.integers(0, 9), max_size=4)


@given(st.lists(st.tuples(some_groups, some_groups), max_size=12))
def test_wires_reach_every_side_of_their_group_and_never_lie_on_one_another(plan) -> None:
    rows = rows_of(plan)
    found = wires(rows)
    for wire in found:
        both = itertools.product(range(len(rows)), ("input", "output"))
        assert sorted(wire.taps) == [(row, side) for row, side in both if wire.group in rows[row].groups(side)]
    assert {wire.group for wire in found} == {s.group for row in rows for s in (*row.inputs, *row.outputs)}
    by_lane: dict[int, list[Wire]] = defaultdict(list)
    for wire in found:
        by_lane[wire.lane].append(wire)
    for mine in by_lane.values():
        spans = sorted((wire.taps[0], wire.taps[-1]) for wire in mine)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize("number", [0, 1, 12, 200, 1000])
def test_colours_differ(number: int) -> None:
    found = colours(number)
    assert len(set(found) - {FROZEN, "#ffffff"}) == number
    assert all(re.fullmatch("#[0-9a-f]{6}", each) for each in found)


# -- hostile names


@given(st.text(st.characters(exclude_characters="."), min_size=1, max_size=60))
def test_any_name_of_a_module_is_text_and_never_markup(name: str) -> None:
    model = nn.Sequential()
    hostile = name + '</text><script>alert("1")&'
    model.add_module(hostile, nn.Conv2d(3, 4, 1))
    model.add_module("head", nn.Conv2d(4, 2, 1))
    picture = draw_graph(compressor.trace(model, torch.zeros(1, 3, 4, 4)))
    picture.encode()
    assert "<script>" not in picture
    assert [title for title in titles(picture) if '</text><script>alert("1")&' in title]


def test_a_long_name_is_shown_by_its_end_and_whole_on_hover() -> None:
    name = "a" * 80 + "_end"
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 4, 1))
    model.add_module("head", nn.Conv2d(4, 2, 1))
    picture = draw_graph(compressor.trace(model, torch.zeros(1, 3, 4, 4)))
    assert ">…" + "a" * 41 + "_end<" in picture
    assert name in titles(picture)


# -- the command line


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compress(*arguments: str):
    return CliRunner().invoke(app, ["inspect", "user_models:tiny", "--image-size", "32", *arguments])


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_inspect_draws_beside_what_it_prints(form: list[str]) -> None:
    result = compress("--svg", "graph.svg", *form)
    assert result.exit_code == 0
    assert result.stdout == compress(*form).stdout
    expected = draw_graph(compressor.trace(user_models.tiny(10), torch.zeros(1, 3, 32, 32)))
    assert Path("graph.svg").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("small.safetensors", "--svg small.safetensors is not the name of a picture: give one that ends in .svg"),
        ("nowhere/graph.svg", "cannot write nowhere/graph.svg: there is no folder nowhere; create it first"),
    ],
)
def test_inspect_refuses_a_place_where_no_picture_belongs(target: str, message: str) -> None:
    Path("small.safetensors").write_text("a model")
    result = compress("--svg", target)
    assert result.exit_code == 2
    assert message in result.stderr
    assert Path("small.safetensors").read_text() == "a model"
