"""`report.json`: a `Report` written, and read back into the same types without loss.

    {"format": "compressor-report", "version": 1, "name": "demo", ..., "dense": {"accuracy": 0.98, ...}, ...}

The file carries a version: a reader refuses what a newer compressor wrote instead of guessing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import msgspec

from compressor.errors import ArtifactError
from compressor.report.document import Report
from compressor.report.files import as_json

FORMAT = "compressor-report"
VERSION = 1

_FREE = ("settings", "machine")  # whatever JSON can say; null is null there


def to_json(report: Report) -> str:
    """Return the text of `report.json`: one object, `format` and `version` first; NaN and infinities become null."""
    # First in the file, so that a reader of any version finds them, whatever comes after.
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(report)}
    return as_json(content)


def from_json(text: str | bytes, source: str) -> Report:
    """Read back what `to_json` wrote; null becomes NaN where a number belongs.

    Args:
        text: the content of the file.
        source: its name, for messages.

    Raises:
        ArtifactError: not JSON, not a report, of a newer version, or a field that is missing, unknown or of another
            type; it is named as `$.dense.accuracy` or `$.epochs[3].lr`.
    """
    content = _checked(_decoded(text, source), source)
    try:
        report = msgspec.convert({name: _nan_for_null(name, value) for name, value in content.items()}, Report)
        # msgspec passes over fields that a dataclass does not have; what such a file meant to say would be lost.
        unknown = next(_unknown(content, msgspec.to_builtins(report)), None)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ArtifactError(f"{source} is damaged: {error}; run the job again, or take the file from a copy") from error
    if unknown:
        raise ArtifactError(
            f"{source} is damaged: unknown field - at `{unknown}`; run the job again, or take the file from a copy"
        )
    return report


def _decoded(text: str | bytes, source: str) -> Any:
    # As plain values first, not as a `Report` at once: the version decides how the rest is to be read.
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ArtifactError(f"{source} is no JSON ({error}); give a run folder that compress made") from error


def _checked(content: Any, source: str) -> dict[str, Any]:
    """Return the fields of a report, without `format` and `version`, which must be ours."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{source} is no report of compressor; give a run folder that compress made")
    if content.get("version") != VERSION:
        raise ArtifactError(
            f"{source} has version {content.get('version')}, and this compressor reads version {VERSION}; "
            "read it with the version that wrote it"
        )
    return {name: value for name, value in content.items() if name not in ("format", "version")}


def _nan_for_null(name: str, value: Any) -> Any:
    """Undo what JSON makes of NaN; a null in place of a text or a whole number is refused afterwards, as a float."""
    if name in _FREE:
        return value
    if isinstance(value, dict):
        return {key: _nan_for_null("", item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_for_null("", item) for item in value]
    return math.nan if value is None else value


def _unknown(given: Any, known: Any, at: str = "$") -> Iterator[str]:
    """Yield the places in JSON content that nothing was read from."""
    if isinstance(given, dict):
        for name, item in given.items():
            if name not in known:
                yield f"{at}.{name}"
            else:
                yield from _unknown(item, known[name], f"{at}.{name}")
    elif isinstance(given, list):
        for index, (item, read) in enumerate(zip(given, known, strict=True)):
            yield from _unknown(item, read, f"{at}[{index}]")
