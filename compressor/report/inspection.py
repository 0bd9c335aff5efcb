"""What `compress inspect` shows: a channel graph as plain values, ready for JSON."""

from __future__ import annotations

from typing import Any

from compressor.budget import CostModel
from compressor.graph import ChannelGraph, Group


def inspect_graph(graph: ChannelGraph) -> dict[str, Any]:
    """Return what can be cut together, what a channel of each group costs now, and what is frozen and why.

    Returns:
        `params` and `macs` of the whole model; `groups`, each with `name`, `channels`, `exact`, `members`,
        `params_per_channel` and `macs_per_channel`; `frozen`, each with `tensor`, `dim`, `count` and `reason`; `notes`.
    """
    costs = CostModel(graph)
    sizes = graph.sizes()
    # At the present sizes: what a channel costs depends on how wide its neighbours are.
    params = costs.per_channel("params", sizes)
    macs = costs.per_channel("macs", sizes)
    return {
        "params": costs.params(sizes),
        "macs": costs.macs(sizes),
        "groups": [_group(group, params[group.name], macs[group.name]) for group in graph.groups],
        "frozen": [vars(frozen) for frozen in graph.frozen],
        "notes": list(graph.notes),
    }


def _group(group: Group, params: float, macs: float) -> dict[str, Any]:
    return {
        "name": group.name,
        "channels": group.size,
        "exact": group.exact,
        "members": [{"tensor": each.tensor, "dim": each.dim, "role": each.role} for each in group.members],
        "params_per_channel": params,
        "macs_per_channel": macs,
    }
