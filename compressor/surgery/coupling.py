"""Groups that a model's code ties by a number: each is refused alone, and they can be cut in proportion.

Attention that computes the width of a head as `C // num_heads` fails when heads go and the width stays, and the other
way round. With the same share of both it runs:

    C = 96, heads = 3    ->    64, 2    width of a head 32 before and after
    one channel of the coupled group: one head, and 32 channels of the width

What is coupled is found by trial: cuts that are made, verified and taken back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch

from compressor.errors import CutError
from compressor.graph import ChannelGraph
from compressor.surgery.cutting import try_cut

logger = logging.getLogger(__name__)


def couple_blocks(graph: ChannelGraph) -> None:
    """Couple groups that can only be cut in proportion; writes the graph, not the model."""
    heads = _refused(graph, graph.blocks)
    if not heads:
        return
    beside = {name: graph.wider_groups_beside(name) for name in heads}
    tied = _refused(graph, {name for names in beside.values() for name in names})
    for names in _connected({name: [each for each in beside[name] if each in tied] for name in heads}):
        sizes = graph.sizes()
        if len(names) < 2 or math.gcd(*(sizes[name] for name in names)) < 2:
            continue
        before = graph.snapshot()
        coupled = graph.couple(names)
        if _refused(graph, [coupled]):
            graph.restore(before)
        else:
            note = f"groups {', '.join(names)} lose channels in proportion: the model's code ties their numbers"
            logger.info(note)
            graph.notes += (note,)


def _refused(graph: ChannelGraph, names: Iterable[str]) -> list[str]:
    """Return the groups of which half cannot be cut; nothing is."""
    sizes = graph.sizes()
    keep = {name: torch.arange((sizes[name] + 1) // 2) for name in names if sizes.get(name, 1) > 1}
    refused: list[str] = []
    while keep:
        try:
            try_cut(graph, keep)
            break
        except CutError as refusal:
            found = [name for name in refusal.groups if name in keep]
            if not found:
                return [*refused, *keep]
            refused += found
            keep = {name: kept for name, kept in keep.items() if name not in found}
    return refused


def _connected(neighbours: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the connected sets of names, each in the order in which it was met."""
    sets: list[list[str]] = []
    for name, others in neighbours.items():
        met = [name, *others]
        touching = [each for each in sets if set(each) & set(met)]
        sets = [each for each in sets if each not in touching]
        sets.append(list(dict.fromkeys([*(member for each in touching for member in each), *met])))
    return sets
