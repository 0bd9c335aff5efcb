"""Is the small model of use? Half of the parameters pruned in one call, held against masking, then a training step."""

from __future__ import annotations

import time

import torch
from torch.utils._pytree import tree_leaves, tree_map

import compressor
from compressor._utils import run_model
from zoo.check import Case, Row

SHARE = 0.5


def prune_and_train(case: Case, row: Row) -> None:
    """Prune with `verify=True` and take one training step; writes what came of both into the row."""
    model, inputs = case.build().eval(), case.inputs()
    start = time.perf_counter()
    result = compressor.prune(model, inputs, "l1", SHARE, verify=True)
    row["prune s"] = time.perf_counter() - start
    row["pruned %"] = 100 * result.removed
    row["coupled"] = sum("lose channels in proportion" in note for note in result.notes)
    try:
        row["trains"] = "yes" if _step(model, inputs) else "NO GRADIENT"
    except Exception as failure:
        row["trains"] = " ".join(f"NO: {type(failure).__name__}: {failure}".split())[:120]


def _step(model: torch.nn.Module, inputs: object) -> bool:
    """Take one step down the mean square of all outputs in training mode; return whether every gradient is finite."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    # Two of each: BatchNorm has no variance of one value.
    twice = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() else x, inputs)
    outputs = [leaf for leaf in tree_leaves(run_model(model, twice)) if isinstance(leaf, torch.Tensor)]
    losses = [leaf.float().square().mean() for leaf in outputs if leaf.requires_grad and leaf.is_floating_point()]
    torch.stack(losses).sum().backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)
