"""How much of a detector or a transformer can go at all, with heads and embeddings each for itself and together.

python benchmarks/reach.py [--names swin_t,vit_b_16] [--share 0.7]

`half of each` is what goes if every group that can be cut for itself loses half of its channels. `prune` is what
`compressor.prune` takes of the share asked for: it cuts heads and embedding in proportion where code couples them. The
pruned model is run once more.
"""

from __future__ import annotations

import copy
import time
from contextlib import suppress
from typing import Annotated, Any

import torch
import typer
from results_file import write
from torch import nn
from zoo import models as zoo

import compressor
from compressor.errors import CompressorError, CutError

TRANSFORMERS = ("swin_t", "swin_s", "swin_v2_t", "maxvit_t", "vit_b_16", "convnext_tiny")
NOTE = (
    "Random weights, torchvision's own sizes (detectors on 128 pixels, 300 or 320 for SSD), L1, uniform widths, no "
    "rounding. Shares are of all parameters, in percent."
)


def main(
    names: Annotated[str, typer.Option(help="Comma list; all detectors and some transformers otherwise.")] = "",
    share: Annotated[float, typer.Option(help="Of the parameters that `prune` is asked to remove.")] = 0.7,
) -> None:
    """Measure, write, and print where the table is."""
    cases = {case.name: case for case in (*zoo.classifiers(), *zoo.dense())}
    detectors = [name for name in cases if any(word in name for word in ("rcnn", "retinanet", "ssd", "fcos"))]
    rows: list[dict[str, Any]] = []
    for name in names.split(",") if names else [*TRANSFORMERS, *detectors]:
        rows.append({"model": name, **reach(cases[name], share)})
        path = write("reach", rows, NOTE)
        print(rows[-1], flush=True)
    print(path)


def reach(case: zoo.Case, share: float) -> dict[str, Any]:
    """Return the shares of one model."""
    model, inputs = case.build().eval(), case.inputs()
    alone = gone(model, copy.deepcopy(model), inputs, share, is_joint=False)
    began = time.perf_counter()
    together = gone(model, copy.deepcopy(model), inputs, share, is_joint=True)
    return {"half of each": alone[0], "prune": together[0], "s": time.perf_counter() - began, "said": together[1]}


def gone(dense: nn.Module, model: nn.Module, inputs: Any, share: float, *, is_joint: bool) -> tuple[float, str]:
    """Cut a model, and return the share of its parameters that is gone, in percent, and what was said of the rest."""
    said = ""
    try:
        if is_joint:
            result = compressor.prune(model, inputs, "l1", share, round_to=1)
            said = "; ".join(result.blocked)
        else:
            cut_alone(model, inputs)
    except CompressorError as error:
        said = str(error)
    with torch.no_grad():
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    left, all_ = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, dense))
    return 100 * (1 - left / all_), said[:300]


def cut_alone(model: nn.Module, inputs: Any) -> None:
    """Halve every group for itself, and leave those whole whose cut is refused."""
    graph = compressor.trace(model, inputs)
    for name, size in graph.sizes().items():
        with suppress(CutError):  # which takes the cut back
            compressor.cut(graph, {name: list(range(0, size, 2))})


if __name__ == "__main__":
    typer.run(main)
