"""compressor makes trained networks physically smaller: fewer channels, not zeros.

    graph = compressor.trace(model, example_inputs)
    result = compressor.prune(model, example_inputs, criterion="l1", budget=0.6)
    compressor.save(model, "small.safetensors")

Names are imported when they are first used, so that `import compressor` (and `compress --help`) stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressor.budget import Budget, Cubic, Limits, Linear, OneShot, PruneResult, Threshold
    from compressor.criteria import CRITERIA, Snapshot
    from compressor.deploy import LatencyCost, Place, export_onnx, load, save
    from compressor.graph import RULES, ChannelGraph, Group, trace
    from compressor.pruning import Pruner, prune
    from compressor.relevance import RelevanceConfig
    from compressor.sparse import SparseConfig, SparseTraining
    from compressor.surgery import cut

_HOME = {
    "Budget": "budget",
    "Threshold": "budget",
    "CRITERIA": "criteria",
    "ChannelGraph": "graph",
    "Cubic": "budget",
    "Group": "graph",
    "LatencyCost": "deploy",
    "Limits": "budget",
    "Linear": "budget",
    "OneShot": "budget",
    "Place": "deploy",
    "PruneResult": "budget",
    "Pruner": "pruning",
    "RULES": "graph",
    "RelevanceConfig": "relevance",
    "Snapshot": "criteria",
    "SparseConfig": "sparse",
    "SparseTraining": "sparse",
    "cut": "surgery",
    "export_onnx": "deploy",
    "load": "deploy",
    "prune": "pruning",
    "save": "deploy",
    "trace": "graph",
}

__all__ = [
    "CRITERIA",
    "RULES",
    "Budget",
    "ChannelGraph",
    "Cubic",
    "Group",
    "LatencyCost",
    "Limits",
    "Linear",
    "OneShot",
    "Place",
    "PruneResult",
    "Pruner",
    "RelevanceConfig",
    "Snapshot",
    "SparseConfig",
    "SparseTraining",
    "Threshold",
    "cut",
    "export_onnx",
    "load",
    "prune",
    "save",
    "trace",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import a public name from the module where it lives."""
    if name not in _HOME:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"compressor.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
