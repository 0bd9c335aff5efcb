"""The books of a pruning: what is counted where a group has left the graph."""

from __future__ import annotations

import pytest
import torch
from test_pruning import wide

import compressor
from compressor.budget import Budget, PruningProgress

X = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def ledger() -> PruningProgress:
    """A group of 32 channels that lost 12 and was refused then, and one of 32 that can still be cut."""
    graph = compressor.trace(wide(), X)
    ledger = PruningProgress(graph, Budget(0.5))
    compressor.cut(graph, {"0": list(range(20))})
    ledger.result(compressor.Budget(0.5))
    graph.freeze(["0"], "its cut was refused")
    return ledger


def test_a_group_that_left_the_graph_counts_as_wide_as_it_was_then(ledger: PruningProgress) -> None:
    result = ledger.result(compressor.Budget(0.5, "channels"))
    assert result.widths == {"0": (32, 20), "3": (32, 32)}
    assert result.channels == (64, 52)
    assert result.params[1] == sum(p.numel() for p in ledger.graph.model.parameters())
    assert result.blocked == ("0: its cut was refused",)


def test_what_remains_of_a_budget_of_channels_is_to_be_found_elsewhere(ledger: PruningProgress) -> None:
    remaining = ledger.remaining(compressor.Budget(0.5, "channels"))
    assert remaining is not None
    assert remaining.goal(32) == 12  # of 64 channels 32 may stay, and 20 are where nothing can go


def test_the_books_go_on_after_an_interruption(ledger: PruningProgress) -> None:
    again = PruningProgress(compressor.trace(ledger.graph.model, X), Budget(0.5))
    again.load_state_dict(ledger.state_dict())
    again.graph.freeze(["0"], "its cut was refused")
    assert again.result(compressor.Budget(0.5)) == ledger.result(compressor.Budget(0.5))


def test_a_lone_channel_is_not_called_refused() -> None:
    graph = compressor.trace(wide(), X)
    ledger = PruningProgress(graph, Budget(0.5))
    compressor.cut(graph, {"0": [3]})
    ledger.result(compressor.Budget(0.5))
    again = PruningProgress(compressor.trace(graph.model, X), Budget(0.5))
    again.load_state_dict(ledger.state_dict())
    assert again.refused() == ledger.refused() == []
    assert again.result(compressor.Budget(0.5)) == ledger.result(compressor.Budget(0.5))
