"""From observed relevance to scores that a selection can rank: per cost, and behind the test.

    relevance   [ 2.0,  2.0, -1.0, -1.0]
    price       [ 1.0,  4.0,  1.0,  4.0]     params, MACs or channels that go with the channel
    score       [ 2.0,  0.5, -1.0, -4.0]     of two useful ones the cheaper stays, of two harmful ones the dearer goes

Shape letters: C channels of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.budget import Cost, CostModel, Measure
from compressor.graph import ChannelGraph
from compressor.relevance import Relevance


def relevance_scores(
    relevance: Relevance, graph: ChannelGraph, measure: Measure | Cost, confidence: float
) -> dict[str, Tensor]:
    """Return `(C,)` scores by group, larger means keep, comparable between groups.

    Args:
        relevance: what was observed so far.
        graph: the graph as it is now.
        measure: in which the budget counts: relevance is taken per what a channel costs in it. Where the cost falls in
            steps, as a latency does, a single channel has no price, and the selection takes what a step saves.
        confidence: channels that are above this go only when the budget leaves no others.
    """
    scores = relevance.scores()
    if isinstance(measure, str):
        scores = per_cost(scores, graph, measure)
    return _protected(scores, relevance.confidence(), confidence)


def per_cost(relevance: Mapping[str, Tensor], graph: ChannelGraph, measure: Measure) -> dict[str, Tensor]:
    """Return relevance by group per what a channel costs in a measure, a channel of the usual price costing 1."""
    price = CostModel(graph).per_channel(measure, graph.sizes())
    usual = sum(price.values()) / max(len(price), 1)
    return {name: _per_cost(each, price[name] / usual) for name, each in relevance.items()}


def _per_cost(relevance: Tensor, price: float) -> Tensor:
    relevance = relevance.double()  # one line of ranks is made of all groups' scores: keep their order exact
    # NOTE: Dividing negative relevance by the price would empty cheap harmless layers first and keep dear harmful ones.
    return torch.where(relevance > 0, relevance / price, relevance * price)


def with_magnitude(relevance: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the root of relevance times the L1 norm of each channel, by group: what ranks channels of a trained model.

    Relevance says what the loss needs now, magnitude what is left to rebuild from; either of them alone chose worse
    (docs/compensation.md). What the others predict, and what nobody reads, stays worth nothing.
    """
    return {name: each.clamp_min(0).sqrt() * norms[name].to(each) for name, each in relevance.items() if name in norms}


def _protected(scores: Mapping[str, Tensor], confidence: Mapping[str, Tensor], least: float) -> dict[str, Tensor]:
    """Rank channels that passed the test behind all that did not, whatever their scores are."""
    everything = torch.cat(list(scores.values()))
    reach = 2 * float(everything.max() - everything.min()) + 1e-30
    return {name: each + reach * (confidence[name] > least) for name, each in scores.items()}
