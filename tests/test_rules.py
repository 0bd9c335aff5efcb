"""Every rule against index arrays that were computed by hand: which positions are one channel, and what is frozen."""

from __future__ import annotations

import pytest
import torch
from rule_cases import CASES, Case

import compressor
from compressor.graph.group import ChannelGraph


def traced(name: str) -> tuple[Case, ChannelGraph]:
    case = CASES[name]
    with torch.inference_mode(case.whole):
        return case, compressor.trace(case.model, torch.zeros(case.shape))


@pytest.mark.parametrize("name", CASES)
def test_channels_are_where_they_were_computed_to_be(name: str) -> None:
    case, graph = traced(name)
    assert case.rules <= {step.op for step in graph.trail.script.steps}
    found = {g.name: {f"{m.tensor}.{m.dim}": m.positions.tolist() for m in g.members} for g in graph.groups}
    assert found == case.groups
    assert any("ran on real tensors" in note for note in graph.notes) == case.real


@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_says_why(name: str) -> None:
    case, graph = traced(name)
    cut = {key for members in case.groups.values() for key in members}
    frozen = {f"{each.tensor}.{each.dim}": each.reason for each in graph.frozen}
    assert set(frozen) - ({"a.weight.1", "b.weight.0"} - cut) == set(case.frozen)
    assert [key for key, why in case.frozen.items() if why not in frozen[key]] == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups])
def test_a_group_is_exact_unless_channels_are_mixed_without_a_weight(name: str) -> None:
    case, graph = traced(name)
    inexact = tuple(case.groups) if case.inexact is True else case.inexact or ()
    assert {group.name: group.exact for group in graph.groups} == {key: key not in inexact for key in case.groups}


def test_every_rule_has_a_case() -> None:
    covered = set().union(*(case.rules for case in CASES.values()))
    assert covered == set(compressor.RULES)
