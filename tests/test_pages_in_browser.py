"""Every page in a real browser, from disk and without a network: no error, nothing loaded, readable on a phone.

The page has no script of its own; it stands in a frame, whose script writes what the browser made of it into a title.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sample_report import sample
from test_comparison import CELLS
from test_side_by_side import run

from compressor.report import comparison, pages, side_by_side

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

PAGES = {
    "run": pages.html(sample()),
    "comparison": comparison.html(comparison.Comparison("grid", "compress compare", CELLS)),
    "side by side": side_by_side.html([run("a"), run("b", "random", accuracy=0.95, ms=1.0)]),
}

# A headless window is never narrower than 500 pixels; a frame has the width that it is given.
FRAME = """<!doctype html><title>not loaded</title>
<iframe id="frame" style="border: 0" width="{width}" height="800" srcdoc="{page}"></iframe>
<script>
document.getElementById("frame").onload = event => {{
  const inner = event.target.contentDocument, root = inner.documentElement;
  // What a browser shows of a picture is the nearest <title> of what lies under the pointer.
  const own = each => each && each.querySelector(":scope > title");
  const dots = [...inner.querySelectorAll("svg circle")].filter(dot => own(dot) || own(dot.closest("g")));
  const says = dots.map(dot => {{
    dot.scrollIntoView({{block: "center", inline: "center"}});
    const box = dot.getBoundingClientRect();
    const top = inner.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    const title = top && (own(top) || own(top.closest("g")));
    return title && title.textContent;
  }});
  const loaded = event.target.contentWindow.performance.getEntriesByType("resource").map(each => each.name);
  const page = inner.defaultView.getComputedStyle(inner.body).backgroundColor;
  document.title = JSON.stringify({{width: root.scrollWidth, window: root.clientWidth, says, loaded, page}});
}};
</script>
"""


def opened(page: str, width: int, folder: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """Return what a browser without a network makes of a page from disk, and what it logged."""
    file = folder / "frame.html"
    file.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom", *flags, file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    return json.loads(html.unescape(title[1])), done.stderr


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_opens_without_error_and_fits(name: str, width: int, tmp_path: Path) -> None:
    seen, log = opened(PAGES[name], width, tmp_path)
    assert width - 20 < seen["window"] <= width  # less a scroll bar
    assert seen["width"] == seen["window"]  # wide tables and pictures scroll in themselves
    assert seen["loaded"] == []
    assert "CONSOLE" not in log
    assert seen["says"]
    assert all(seen["says"])


def test_pages_are_dark_where_the_reader_wants_them_so(tmp_path: Path) -> None:
    light, _ = opened(PAGES["run"], 1280, tmp_path)
    dark, _ = opened(PAGES["run"], 1280, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light["page"] == "rgb(246, 247, 249)"
    assert dark["page"] == "rgb(17, 21, 28)"


def test_the_probe_notices_what_is_wrong(tmp_path: Path) -> None:
    wrong = '<p style="width: 900px">wide</p><img src="https://example.org/x.png"><script>console.error("no")</script>'
    seen, log = opened(PAGES["run"].replace("</body>", wrong + "</body>"), 390, tmp_path)
    assert seen["width"] > 390
    assert seen["loaded"] == ["https://example.org/x.png"]
    assert "CONSOLE" in log
