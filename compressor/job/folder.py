"""The run folder: when it may be used, what is in it, and how a run is taken up again.

    config.toml  metrics.jsonl  checkpoint/  model.safetensors  model.onnx  dense.safetensors  dense.onnx  report.*
    README.md             a model card, where there is none of somebody's own
    model.int8.onnx       with --precision, and dense.int8.onnx; model.int8.failed.onnx where it missed the gate
    tensorboard/          with --tensorboard

One process at a time works in a run folder: `.lock` is held by the system as long as that process lives, whatever ends
it, and `.lock.txt` says who that is. A folder is a run folder if it holds a `config.toml` with the options of a run.
Nothing but the names above is ever written or removed in it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor import report
from compressor._utils import atomic_write, remove_unfinished
from compressor.deploy import PRECISIONS
from compressor.errors import InputError, RunFolderError
from compressor.job.board import BOARD, Board, clear_board
from compressor.job.options import read_toml
from compressor.job.settings import Settings, option_kinds
from compressor.training import NEWEST, PREVIOUS

LOWERED = tuple(f"{name}.{kind}.onnx" for kind in PRECISIONS[1:] for name in ("model", "dense"))
MODELS = ("model.safetensors", "model.onnx", "dense.safetensors", "dense.onnx", *LOWERED)
RECORDS = (_CONFIG, _METRICS) = ("config.toml", "metrics.jsonl")
REPORTS = ("report.html", "report.md", "report.json")
_CHECKPOINTS = "checkpoint"
_FAILED = tuple(name.replace(".onnx", ".failed.onnx") for name in MODELS if name.endswith(".onnx"))
_LOCK = ".lock"
_HOLDER = ".lock.txt"
# Every config.toml of a run has all of these; a file of somebody else's with one of them makes no folder a run.
_MARK = {"criterion", "model", "stem", "data", "epochs", "batch-size", "lr", "seed", "device", "out"}
_FIXED = " (learning rate and cuts are planned from the first step to the last, so that no epoch can be added)"
_FREE = {"out", "download", "device", "cache", "tensorboard"}  # options that may differ when a run is taken up again


def resumed(asked: Mapping[str, Any], source: str = "") -> Settings:
    """Return the settings of a run that is to go on.

    Args:
        asked: options that were typed, by name; those of the run itself are added.
        source: the file that they are from, for messages.

    Raises:
        RunFolderError: there is no run to go on with, or it has other settings.
    """
    out = asked.get("out") or Settings.from_options(asked, source).out
    kept = _config(Path(out))
    if kept is None and (Path(out) / _CONFIG).exists():
        read_toml(Path(out) / _CONFIG)  # says what is wrong with it, if it is no TOML
        raise RunFolderError(f"{out}/{_CONFIG} lacks options that every run has: it is damaged, or another program's")
    if kept is None:
        raise RunFolderError(f"{out} holds no run to go on with (no config.toml of compress): leave --resume out")
    # What a trial found stands in the run's own options: asked for again, it is that.
    asked = {name: value for name, value in asked.items() if (name, value) != ("lr", "auto")}
    for name, value in asked.items():
        if name not in _FREE and value != kept.get(name, value):
            why = _FIXED if name in ("epochs", "finetune-epochs") else ""
            raise RunFolderError(
                f"the run in {out} has --{name} {kept[name]}, not {value}{why}: leave it out to go on, or give another "
                "--out"
            )
    return Settings.from_options({**kept, **asked, "out": out}, source or f"{out}/config.toml")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run folder, which is made if need be; an empty one is taken away afterwards.

    Raises:
        RunFolderError: another process works in it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, timeout=0)
        lock.acquire()
        (folder / _HOLDER).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    except Timeout as error:
        raise RunFolderError(
            f"{folder} is in use by {_holder(folder)}: wait until it ends, or give another --out"
        ) from error
    except OSError as error:
        raise RunFolderError(f"cannot write to {folder}: {error.strerror}; give another --out") from error
    try:
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()
        _remove_if_unused(folder, made)


def _holder(folder: Path) -> str:
    try:
        return (folder / _HOLDER).read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


def _remove_if_unused(folder: Path, made: Iterable[Path]) -> None:
    """Take away folders that a run made and, refused, left empty."""
    if not made or any(each.name != _LOCK for each in folder.iterdir()):
        return
    (folder / _LOCK).unlink(missing_ok=True)
    for each in made:
        each.rmdir()


def require_usable(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that the run may not use; nothing is changed.

    Raises:
        InputError: both resume and overwrite.
        RunFolderError: it is there and holds something, or is no run folder.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite contradict each other: leave one of them out")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: give another --out")
    if resume or not folder.exists() or all(map(_is_beginning, folder.iterdir())):
        return
    if _config(folder) is None:
        raise RunFolderError(f"{folder} is there and is no run folder of compress: give another --out")
    if not overwrite:
        raise RunFolderError(
            f"run folder {folder} is there already: --resume goes on with it, --overwrite replaces it, "
            "or give another --out"
        )


def _is_beginning(path: Path) -> bool:
    """Return whether a file is what a run has before it has a config.toml."""
    return path.name in (_LOCK, _HOLDER) or (path.name.startswith(f".{_CONFIG}.") and path.suffix == ".part")


def start(folder: Path, settings: Settings) -> None:
    """Clear away an earlier run, and write `config.toml`; the folder is there and locked."""
    # NOTE: config.toml is replaced, never removed: a run that is killed here leaves a run folder, not a foreign one.
    with _writing_to(folder):
        _clear_checkpoints(folder / _CHECKPOINTS)
        for name in (*REPORTS, *MODELS, *_FAILED, _METRICS):
            (folder / name).unlink(missing_ok=True)
        report.remove_card(folder)
        clear_board(folder / BOARD)
    with atomic_write(folder / _CONFIG) as part:
        part.write_text(settings.toml(), encoding="utf-8")


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left half written; the folder is locked."""
    checkpoints = [each for each in (folder / _CHECKPOINTS).rglob("*") if each.is_dir()]
    paths = [folder / name for name in (*REPORTS, *MODELS, *RECORDS)]
    with _writing_to(folder):
        for path in (*paths, *(each / name for each in checkpoints for name in (NEWEST, PREVIOUS))):
            remove_unfinished(path)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"cannot write to {folder}: {error.strerror}; give another --out") from error


def _clear_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run, and the folders that are empty then; what else lies there is somebody's own."""
    for each in sorted(folder.rglob("*"), reverse=True):
        if each.name in (NEWEST, PREVIOUS) and not each.is_dir():
            each.unlink()
        elif each.is_dir() and not any(each.iterdir()):
            each.rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def checkpoint(folder: Path, stage: str) -> Path:
    """Return the folder in which a stage of the run keeps its checkpoint."""
    return folder / _CHECKPOINTS / stage


def copy_checkpoints(source: Path, folder: Path, stages: Iterable[str]) -> None:
    """Take the checkpoints of some stages over from another run, as far as it has them."""
    for stage in stages:
        if checkpoint(source, stage).is_dir():
            shutil.copytree(checkpoint(source, stage), checkpoint(folder, stage))


class Metrics:
    """`metrics.jsonl`: one record a line, as they come; rewritten at the end of a stage as its checkpoint has them.

    Without a path nothing is written: another process of the same training does. With a board they are shown there too.
    """

    def __init__(self, path: Path | None, board: Board | None = None) -> None:
        self._path = path
        self._board = board
        self.records: list[dict[str, Any]] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one more record."""
        if self._board:
            self._board.show(record)
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def replace_stage(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the records of a stage that is over in place of what was appended while it ran."""
        self.records += [dict(record) for record in records]
        if self._path is None:
            return
        with atomic_write(self._path) as part:
            part.write_text("".join(map(_line, self.records)), encoding="utf-8")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def is_run_folder(folder: Path) -> bool:
    """Return whether a run has begun in a folder."""
    return _config(folder) is not None


def _config(folder: Path) -> dict[str, Any] | None:
    """Return the options of the run in a folder; None if it is no run folder."""
    try:
        options = read_toml(folder / _CONFIG)
    except InputError:
        return None
    return options if _MARK <= options.keys() <= option_kinds().keys() else None
