"""Functions of the user's own, by import path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from compressor.errors import InputError, UnknownNameError


@contextmanager
def present_folder_importable() -> Iterator[None]:
    """Let modules of the present folder be imported while a function runs that the user named.

    The folder comes last, so that a file in it never hides an installed package.
    """
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.reverse()  # the last one is ours; an equal one before it may be the user's
        sys.path.remove(folder)
        sys.path.reverse()


def imported(path: str, what: str) -> Callable[..., object]:
    """Return the function at `package.module:function`, or `folder/file.py:function`.

    Args:
        path: where it is.
        what: what it is in the user's words, "factory" say.

    Raises:
        InputError: that is no such path, or the module does not import.
        UnknownNameError: the module has no such function.
    """
    module_name, _, attribute = path.rpartition(":")
    if not module_name or not attribute:
        raise InputError(f"{path!r} is no import path: give package.module:{what}")
    try:
        module = _module(module_name)
    except Exception as error:  # the module's own code runs here
        advice = "is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else "it must import cleanly"
        raise InputError(f"cannot import {module_name!r} for {path}: {first_line(error)}; {advice}") from error
    found: Callable[..., object] | None = getattr(module, attribute, None)
    if not callable(found):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UnknownNameError(f"{what} in module {module_name}", attribute, public)
    return found


def _module(name: str) -> ModuleType:
    """Return a module by its dotted name or, `folder/file.py`, by its file; one in the present folder goes first.

    A file of one's own may be called `test.py` or `code.py`, as modules of Python are.
    """
    file = Path(name) if name.endswith(".py") else Path(f"{name}.py")
    if not file.is_file():
        if name.endswith(".py"):
            raise FileNotFoundError(f"there is no file {file}")
        return importlib.import_module(name)
    own = f"_user_{file.stem}"  # not its plain name, which may be another module's
    spec = importlib.util.spec_from_file_location(own, file.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # dataclasses and pickles of its classes look for it there
    spec.loader.exec_module(module)
    return module


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error: a library's own may fill a page."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
