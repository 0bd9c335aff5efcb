"""The channel graph on whole zoos of models: right or refused on every one, how fast, and how that grows.

    python benchmarks/graph_zoo.py [--part torchvision] [--only resnet18,vit_b_16] [--no-timing] [--missing]

Parts: `torchvision` (all classifiers, Torch-Pruning beside them), `dense` (detection, segmentation, video, optical
flow), `timm` (150 models over its families), `growth` (time over depth, DenseNet-201, a second cut); and, if they are
installed (the extra `zoo`), `ultralytics`, `smp`, `monai`, `transformers`, `diffusers`, which are also pruned by half
in one call that compares with masking, and then trained for a step.

Every row is written as soon as it is there, to one dated file a part; rows that the same machine made that day or the
day before stay until their model is measured again. `graph-zoo` sums up all parts.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from statistics import geometric_mean
from typing import Annotated

import torch
import typer
from results_file import earlier, write
from rich.progress import track
from zoo import growth
from zoo.check import TOLERANCE, Case, Row, check
from zoo.foreign import PACKAGES
from zoo.models import classifiers, dense, timm_cases
from zoo.peer import beside_torch_pruning
from zoo.usage import prune_and_train

from compressor.errors import UnknownNameError

CHECKED = (
    "Double precision, fresh weights, shaken BatchNorm statistics, scales and biases. Half the channels of every exact "
    "group are cut. `error` is the largest relative difference between the cut and the masked model "
    f"(right: at most {TOLERANCE[torch.float64]}), `error at another size` the same on images 32 pixels taller "
    "and 64 wider, where the model takes them, `effect` that between the masked and the whole one. Then half of "
    "every other group is cut, and the model must still run. A group that refuses is frozen. `right`: exact groups "
    "were cut, and rightly; `runs`: only groups that are not exact; `refused`: nothing was cut. `build ms` and `cut "
    "ms` are of one run, for orientation."
)
TIMED = (
    " The other times: trace or dependency graph, and cut of half, in single precision on one thread, ours and "
    "Torch-Pruning's (`theirs`) in turns, medians of n. Neither scores, refusals are included. Images of 224 pixels "
    "(inception_v3: 299). Torch-Pruning may take as long as `--limit` says, and runs three times instead of five above "
    "20 s, once above 60 s."
)
USED = (
    " `pruned %` and `prune s`: one call of `compressor.prune(model, inputs, 'l1', 0.5, verify=True)` on the same "
    "model in single precision, with heads and width coupled where the code ties them. `trains`: a step of SGD "
    "afterwards, on the mean square of all outputs in training mode."
)
NOTES = {
    "torchvision": CHECKED + TIMED,
    "dense": CHECKED + " Detectors are compared by their heads, before boxes are sorted and "
    f"suppressed; RAFT in single precision, to {TOLERANCE[torch.float32]}.",
    "timm": CHECKED + " Chosen by `benchmarks/zoo/choose.py`.",
    **dict.fromkeys(PACKAGES, CHECKED + USED),
    "growth": "Trace and cut of half, single precision, medians of n. A channel-member is one channel on one dimension "
    "of one tensor.",
}  # fmt: skip

TIMES = ("Torch-Pruning", *(f"{who} {what}" for who in ("ours", "theirs") for what in ("ms", "range ms", "n")), "ratio")
Measure = Callable[[Row], None]


def measures(part: str, timing: bool, limit_s: int) -> dict[str, Measure]:
    """Return what measures each model of a part, by name."""
    if part == "growth":
        return growth.MEASURES
    if part in PACKAGES:
        return {case.name: partial(_measure_use, case) for case in PACKAGES[part]()}
    cases = {"torchvision": classifiers, "dense": dense, "timm": timm_cases}[part]()
    return {case.name: partial(_measure, case, limit_s if timing and part == "torchvision" else 0) for case in cases}


def _measure_use(case: Case, row: Row) -> None:
    check(case, row)
    prune_and_train(case, row)


def _measure(case: Case, limit_s: int, row: Row) -> None:
    check(case, row)
    if limit_s:
        beside_torch_pruning(case, limit_s, row)


def run(part: str, chosen: Mapping[str, Measure], order: Iterable[str], rows: dict[str, Row], timing: bool) -> None:
    """Measure the chosen models one after the other; the file is written again after each."""
    places = {name: place for place, name in enumerate(order)}
    for name in track(chosen, description=part):
        # A check that times nothing leaves the times of the day.
        times = {} if timing else {column: rows[name][column] for column in TIMES if column in rows.get(name, {})}
        rows[name] = row = {"model": name, **times}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's models, on every version of torch
                chosen[name](row)
        except Exception as failure:
            row["failed"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
        rows = dict(sorted(rows.items(), key=lambda item: places.get(item[0], len(places))))
        write(f"graph-zoo-{part}", list(rows.values()), NOTES[part])
        gc.collect()


def known_rows(part: str) -> dict[str, Row]:
    """Return the rows that this machine made lately, by model."""
    return {row["model"]: row for row in earlier(f"graph-zoo-{part}")}


# -- summing up


def summary() -> list[Row]:
    """Hold the rows of all parts against the targets."""
    rows = {part: list(known_rows(part).values()) for part in NOTES}
    lines = [
        _line("torchvision classifiers", "all 80 right, none wrong", _verdicts(rows["torchvision"])),
        _line("torchvision detection, segmentation, video, flow", "no crash, none wrong", _verdicts(rows["dense"])),
        _line("timm", ">= 95 % right, none wrong", _verdicts(rows["timm"])),
        *(_line(part, "none wrong, no crash", _verdicts(rows[part])) for part in PACKAGES),
        _line("build + cut beside Torch-Pruning", ">= 10 times faster, slower on none", _ratios(rows["torchvision"])),
    ]
    for row in rows["growth"]:
        if row["model"] == "densenet201" and "n" in row:
            found = f"{row['build + cut ms']:.0f} ms; second cut {row['second cut ms']:.0f} ms (medians of {row['n']})"
            lines.append(_line("DenseNet-201 build + cut; second cut", "<= 1000 ms; <= 100 ms", found))
    for net in ("chain", "dense "):
        exponent = growth.exponent(rows["growth"], net)
        found = "" if exponent is None else f"time ~ channel-members ^ {exponent:.2f}"
        lines.append(_line(f"growth, {net.strip()}", "no faster than n log n (about 1.1 here)", found))
    return lines


def _line(what: str, to_reach: str, found: str) -> Row:
    return {"what": what, "to reach": to_reach, "found": found or "not measured"}


def _verdicts(rows: list[Row]) -> str:
    counts = Counter(row.get("verdict", "failed") for row in rows)
    others = "".join(f", {count} {verdict}" for verdict, count in counts.items() if verdict != "right")
    return f"{counts['right']} of {len(rows)} right ({counts['right'] / len(rows):.1%}){others}" if rows else ""


def _ratios(rows: list[Row]) -> str:
    timed = [row for row in rows if "ratio" in row]
    ratios = [row["ratio"] for row in timed if row["Torch-Pruning"] == "ok"]
    if not ratios:
        return ""
    slower = sum(ratio < 1 for ratio in ratios)
    broken = [row["ratio"] for row in timed if row["Torch-Pruning"] != "ok"]
    unfinished = sum("Torch-Pruning" in row and "ratio" not in row for row in rows)
    return (
        f"{geometric_mean(ratios):.1f} times faster (geometric mean of {len(ratios)}, {min(ratios):.2f} to "
        f"{max(ratios):.0f}), slower on {slower}; Torch-Pruning left {len(broken)} more broken (and was faster on "
        f"{sum(ratio < 1 for ratio in broken)} of them), and raised or did not finish on {unfinished}"
    )


def main(
    part: Annotated[
        str, typer.Option(help="torchvision, dense, timm, growth, or a package; several with commas")
    ] = "torchvision,dense,timm,growth",
    only: Annotated[str, typer.Option(help="these models of the part, with commas between")] = "",
    timing: Annotated[bool, typer.Option(help="time the classifiers beside Torch-Pruning, which takes hours")] = True,
    limit: Annotated[int, typer.Option(help="seconds that Torch-Pruning may take for one model")] = 240,
    missing: Annotated[bool, typer.Option("--missing", help="go on: leave out models measured lately")] = False,
) -> None:
    """Measure, write, and print where the tables are."""
    torch.set_num_threads(1)
    parts = part.split(",")
    for name in parts:
        if name not in NOTES:
            raise UnknownNameError("part", name, NOTES)
    for name in parts:
        known, rows = measures(name, timing, limit), known_rows(name)
        wanted = only.split(",") if only else list(known)
        for model in wanted:
            if model not in known:
                raise UnknownNameError(f"model of part {name}", model, known)
        run(name, {model: known[model] for model in wanted if not (missing and model in rows)}, known, rows, timing)
    print(write("graph-zoo", summary(), "Where the rows come from: the dated files of the parts, beside this one."))


if __name__ == "__main__":
    typer.run(main)
