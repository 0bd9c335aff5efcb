"""Files are written beside their place and renamed: nobody ever sees half of one, and a failure leaves the old one."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import InputError

_UNFINISHED = ".part"


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of their writing `path`; no other process may be writing it."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
        part.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Return a path to write to; it becomes `path` when the block ends well, and is removed when it does not.

    Raises:
        InputError: there is no such folder, `path` is a folder, or the system refuses to write there.
    """
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    part = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        part.touch()
        mode = part.stat().st_mode  # what the user's umask gives; some libraries write files that only they can read
        yield part
        part.chmod(mode)
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; free space or give another place") from error
    finally:
        part.unlink(missing_ok=True)
