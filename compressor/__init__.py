"""compressor makes trained networks physically smaller: fewer channels, not zeros.

    graph = compressor.trace(model, example_inputs)
    result = compressor.prune(model, example_inputs, criterion="l1", sparsity=0.6)
    compressor.save(model, "small.safetensors")

Names are imported when they are first used, so that `import compressor` (and `compress --help`) stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressor.artifact import load, save
    from compressor.criteria import CRITERIA
    from compressor.export import export_onnx
    from compressor.graph.group import ChannelGraph, Group, Snapshot
    from compressor.graph.rules import RULES
    from compressor.graph.trace import trace
    from compressor.intraining.sparse import SparseTraining
    from compressor.ledger import PruneResult
    from compressor.limits import Limits
    from compressor.pruner import Pruner
    from compressor.pruning import prune
    from compressor.schedules import Cubic, Linear, OneShot
    from compressor.selection import Budget
    from compressor.surgery import cut

_HOME = {
    "Budget": "selection",
    "CRITERIA": "criteria",
    "ChannelGraph": "graph.group",
    "Cubic": "schedules",
    "Group": "graph.group",
    "Limits": "limits",
    "Linear": "schedules",
    "OneShot": "schedules",
    "PruneResult": "ledger",
    "Pruner": "pruner",
    "RULES": "graph.rules",
    "Snapshot": "graph.group",
    "SparseTraining": "intraining.sparse",
    "cut": "surgery",
    "export_onnx": "export",
    "load": "artifact",
    "prune": "pruning",
    "save": "artifact",
    "trace": "graph.trace",
}

__all__ = [
    "CRITERIA",
    "RULES",
    "Budget",
    "ChannelGraph",
    "Cubic",
    "Group",
    "Limits",
    "Linear",
    "OneShot",
    "PruneResult",
    "Pruner",
    "Snapshot",
    "SparseTraining",
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
