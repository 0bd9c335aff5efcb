"""The model card of a run: `README.md` with the front matter that model hubs read."""

from __future__ import annotations

import json
from pathlib import Path

from compressor.report.document import Report
from compressor.report.tables import comparison, grid, summary

NAME = "README.md"
_OURS = "library_name: compressor"  # what tells our card from a page that the user wrote


def model_card(report: Report) -> str:
    """Return the card: who the model is, what it scores, how to run it."""
    settings = report.settings
    data = str(settings["data"]).rstrip("/").rpartition("/")[2]
    head = [
        "---",
        _OURS,
        "pipeline_tag: image-classification",
        "tags: [pruning, onnx]",
        "model-index:",
        f"- name: {json.dumps(report.name)}",
        "  results:",
        "  - task: {type: image-classification}",
        f"    dataset: {{name: {json.dumps(data)}, type: {json.dumps(data)}}}",
        f"    metrics: [{{type: accuracy, value: {report.pruned.accuracy:.4f}}}]",
        "---",
    ]
    rows = [(row.label, row.dense, row.pruned, row.change) for row in comparison(report)]
    parts = [
        "\n".join(head),
        f"# {report.name}",
        f"`{settings['model']}` for `{data}`, made smaller by `{settings['criterion']}`. {summary(report)}.",
        grid(("", "dense", "pruned", "change"), rows),
        "`model.onnx` says in its metadata what it takes: class names, image size, normalisation.",
        "```\ncompress predict model.onnx photos/\n```",
        "`model.safetensors` is the same network for PyTorch: `compressor.load(path)`.",
        f"Made by:\n\n```\n{report.command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def remove_card(folder: Path) -> None:
    """Take away the card that an earlier run wrote; one of the user's own stays."""
    if not is_users_own(folder / NAME):
        (folder / NAME).unlink(missing_ok=True)


def is_users_own(path: Path) -> bool:
    """Return whether a file of the card's name is there that no run wrote."""
    return path.exists() and _OURS not in path.read_text(encoding="utf-8", errors="replace")
