"""The report of a run as Markdown."""

from __future__ import annotations

from compressor.report.document import Report
from compressor.report.layer_rows import HEAD, layer_rows
from compressor.report.tables import CLASS_HEAD, classes, comparison, grid, kept, size, summary


def markdown(report: Report) -> str:
    """Return the report as Markdown: the summary, the comparison, channels, files, machine, the command."""
    channels = [(layer.name, str(layer.before), str(layer.after), kept(layer)) for layer in report.layers]
    files = [(name, size(bytes_)) for name, bytes_ in report.files.items()]
    machine = [(key, str(value)) for key, value in report.machine.items()]
    parts = [
        f"# {report.name}",
        summary(report) + ".",
        grid(("", "dense", "pruned", "change"), [(r.label, r.dense, r.pruned, r.change) for r in comparison(report)]),
        "## Channels",
        grid(("group", "before", "after", "kept"), channels),
        *(["## Relevance", grid(RELEVANCE_HEAD, relevance(report))] if report.relevance else []),
        *(["## Layers", grid(HEAD, layer_rows(report.layer_times))] if report.layer_times else []),
        *(["## Classes", grid(CLASS_HEAD, classes(report))] if report.classes else []),
        *(["## Notes", "\n".join(f"- {note}" for note in report.notes)] if report.notes else []),
        "## Files",
        grid(("file", "size"), files),
        "## Machine",
        grid(("", ""), machine),
        "## Again",
        f"```\n{report.command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


RELEVANCE_HEAD = ("group", "channels", "above chance", "undecided", "reliability")


def relevance(report: Report) -> list[tuple[str, ...]]:
    """Return a row for every group that relevance observed, as it was before the last cut."""
    return [
        (each.name, str(len(each.is_above)), str(sum(each.is_above)), str(each.undecided), f"{each.reliability:.2f}")
        for each in report.relevance
    ]
