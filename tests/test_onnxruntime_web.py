"""A pruned network in a browser: onnxruntime-web in Chromium gives what onnxruntime gives here.

The page is the one that docs/browser shows users. onnxruntime-web comes from npm.
"""

from __future__ import annotations

import html
import json
import queue
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from compressor import job
from compressor.deploy import open_session
from compressor.job import Settings
from compressor.training import load_data

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NPM = shutil.which("npm")
IMAGES = 12
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or NPM is None, reason="needs Chromium and npm: apt-get install chromium npm"),
]


# In the copy that is served: what the page has become, told to whoever serves it.
TELL = """
<script>
new MutationObserver(() => {
  if (document.title === "done") fetch("/told", {method: "POST", body: document.documentElement.outerHTML});
}).observe(document.querySelector("title"), {childList: true});
</script>
</head>
"""


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, logs nothing, and keeps what it is told."""

    told: ClassVar[queue.Queue[str]]  # what pages tell, set anew for every server

    extensions_map: ClassVar[dict[str, str]] = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        """Keep it."""
        self.told.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, queue.Queue[str]]]:
    """A folder, the address under which this machine serves it, and what pages there tell."""
    Handler.told = queue.Queue()
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", Handler.told
    server.shutdown()
    thread.join()
    server.server_close()


def fetch_onnxruntime_web(folder: Path) -> None:
    """Put `dist/` of the npm package into a folder."""
    packed = subprocess.run([str(NPM), "pack", "onnxruntime-web", "--silent"], cwd=folder, check=False, timeout=300)
    if packed.returncode:
        pytest.skip("npm cannot fetch onnxruntime-web: no network?")
    (archive,) = folder.glob("onnxruntime-web-*.tgz")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    (folder / "package/dist").rename(folder / "dist")


def test_a_browser_sees_what_we_see(served: tuple[Path, str, queue.Queue[str]], tmp_path: Path) -> None:
    folder, address, told = served
    run = tmp_path / "run"
    options = {"model": "user_models:tiny", "criterion": "l1", "epochs": 12, "finetune-epochs": 4, "round-to": 4}
    job.run(Settings.from_options({**options, "out": str(run)}), timings=False)
    made = job.export(
        run / "model.safetensors", folder / "model.onnx", job.ExportOptions("user_models:tiny", preprocess=True)
    )
    data = load_data("digits")
    pixels = data.test.images.take(data.test.indices[:IMAGES], torch.device("cpu")).movedim(1, -1).numpy()
    names = [f"{index}.png" for index in range(IMAGES)]
    for name, each in zip(names, pixels, strict=True):
        Image.fromarray(each).save(folder / name)
    (folder / "classes.json").write_text(json.dumps(data.classes))
    page = (Path(__file__).parents[1] / "docs/browser/index.html").read_text(encoding="utf-8")
    (folder / "index.html").write_text(page.replace("</head>", TELL), encoding="utf-8")
    fetch_onnxruntime_web(folder)
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--remote-debugging-port=0",  # else it would leave when the page is loaded
        f"{address}/index.html?images={','.join(names)}",
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as browser:
        try:
            seen = told.get(timeout=120)
        finally:
            browser.terminate()
    assert "CONSOLE" not in log.read_text()
    rows = [json.loads(html.unescape(each)) for each in re.findall(r'data-shares="(.*?)"', seen)]
    session = open_session(made.path)
    (expected,) = session.run(None, {session.get_inputs()[0].name: pixels})
    np.testing.assert_allclose(np.asarray(rows), expected, atol=1e-5)
    # What the page shows a reader: the classes, nearly all of them right, and its own latency.
    shown = re.findall(r"<td>(.*?)</td><td>(.*?)</td><td>", seen)
    assert shown == [(name, data.classes[int(each.argmax())]) for name, each in zip(names, expected, strict=True)]
    assert sum(int(a.argmax()) == int(b) for a, b in zip(expected, data.test.targets[:IMAGES], strict=True)) >= 9
    latency = re.search(rf"{IMAGES} images, ([\d.]+) ms each", seen)
    assert latency is not None
    assert float(latency[1]) > 0
