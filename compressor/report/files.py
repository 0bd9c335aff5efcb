"""What every report does to become files: templates filled in, JSON laid out for readers, all written whole."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from markupsafe import Markup

from compressor._utils import atomic_write


def filled_in(template: str, **values: Any) -> str:
    """Return a template of this package as one HTML page with the style of all: no script, nothing loaded.

    Args:
        template: its file name.
        values: what it names. A name that it misspells is an error, and not an empty place in a page.
    """
    import jinja2  # only who renders pays for it

    folder = resources.files(__package__)
    style = Markup(folder.joinpath("page.css").read_text(encoding="utf-8"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = folder.joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(style=style, **values)


def as_json(content: Any) -> str:
    """Return the text of a JSON file; NaN and infinities become null."""
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n"


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files, each whole or not at all."""
    for path, text in texts.items():
        with atomic_write(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
