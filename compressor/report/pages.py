"""A run folder's report: `report.json` (complete), `report.html` (one self-contained page), `report.md`, and
a model card, `README.md`.

The JSON file is the source; the other two are rendered from it, now or years later.
"""

from __future__ import annotations

from pathlib import Path

from compressor.errors import RunFolderError
from compressor.report import layer_rows, pictures, relevance_picture, tables, throughput_picture
from compressor.report.document import Report
from compressor.report.files import filled_in, write_texts
from compressor.report.markdown import markdown
from compressor.report.model_card import NAME, is_users_own, model_card
from compressor.report.serialization import from_json, to_json


def write(report: Report, folder: Path) -> None:
    """Write the pages, and then `report.json`: the presence of that file says that a run is finished."""
    render(report, folder)
    write_texts({folder / "report.json": to_json(report)})


def render(report: Report, folder: Path) -> list[Path]:
    """Write `report.html`, `report.md` and the model card into `folder` and return their paths."""
    pages = {folder / "report.html": html(report), folder / "report.md": markdown(report)}
    if not is_users_own(folder / NAME):
        pages[folder / NAME] = model_card(report)
    write_texts(pages)
    return list(pages)


def read(folder: Path) -> Report:
    """Read the report of a run folder.

    Raises:
        RunFolderError: there is no `report.json` in it.
        ArtifactError: the file is damaged, foreign, or of another version.
    """
    path = folder / "report.json"
    if (folder / "compare.json").is_file():
        raise RunFolderError(
            f"{folder} is the folder of a grid, and its comparison is {folder / 'compare.html'}: give the folders of "
            "its runs, which lie in it"
        )
    if not path.is_file():
        raise RunFolderError(
            f"{folder} holds no report.json; give the folder of a finished run, or finish it: --resume"
        )
    return from_json(path.read_bytes(), str(path))


def html(report: Report) -> str:
    """Return the report as one HTML page: no script, nothing loaded from elsewhere, light and dark."""
    return filled_in(
        "page.html.j2",
        report=report,
        comparison=tables.comparison(report),
        layer_head=layer_rows.HEAD,
        layer_rows=layer_rows.layer_rows(report.layer_times),
        class_head=tables.CLASS_HEAD,
        classes=tables.classes(report),
        fastest=_speed_tiles(report),
        has_shared=any(epoch.stage == "train" for epoch in report.epochs),
        files=[(name, tables.size(size_bytes)) for name, size_bytes in report.files.items()],
        pictures={
            "channels": pictures.channels(report.layers),
            "training": pictures.training(report),
            "latency": pictures.latency(report.timings),
            "throughput": throughput_picture.throughput(report.timings),
            "relevance": relevance_picture.relevance(report.relevance),
        },
    )


def _speed_tiles(report: Report) -> list[dict[str, object]]:
    """Return the gain at batch size 1, one tile for each backend; no number where it is within the noise."""
    timed = [each for each in tables.pairs(report.timings) if each.dense.batch_size == 1]
    return [
        {"place": each.place, "ratio": None if each.speedup.is_within(each.noise) else each.speedup.ratio}
        for each in timed
    ]
