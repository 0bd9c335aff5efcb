"""The pages of docs/guide run: their Python, from top to bottom, in an empty folder."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from shapes import write_yolo_dataset

PAGES = Path(__file__).parents[1] / "docs" / "guide"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ.setdefault("YOLO_OFFLINE", "true")


def blocks(page: Path) -> list[tuple[int, str]]:
    """The pieces of Python of a page, with the lines on which they begin."""
    text = page.read_text(encoding="utf-8")
    return [(text[: found.start(1)].count("\n"), found.group(1)) for found in BLOCK.finditer(text)]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in ("unet", "yolo")))
        for page in sorted(PAGES.glob("*.md"))
    ],
)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "yolo":
        pytest.importorskip("ultralytics")
        write_yolo_dataset(tmp_path / "shapes", {"train": 48, "val": 16}, 64)
    monkeypatch.chdir(tmp_path)
    pieces = blocks(page)
    assert pieces
    names: dict[str, Any] = {"__name__": "page"}
    for line, code in pieces:
        # The lines of a traceback are those of the page.
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_every_page_is_in_the_menu_of_the_site() -> None:
    docs = PAGES.parent
    menu = (docs.parent / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.md", menu))
    assert listed == {str(page.relative_to(docs)) for page in docs.rglob("*.md")}
