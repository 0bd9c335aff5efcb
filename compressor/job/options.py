"""How options are declared, read from TOML and typed: everything about them that is the same for each.

An option is a field of `Settings`. Its default is None where other options decide what it comes to, and `shown` says so
in the help; where a component's own config has the default, the field only names that config and its field.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compressor.errors import InputError

NumberOrAuto = float | Literal["auto"]
WholeOrAuto = int | Literal["auto"]
_KINDS: dict[Any, str] = {
    NumberOrAuto: 'a number, or "auto"',
    WholeOrAuto: 'a whole number, or "auto"',
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: 'a list of texts, ["layer1.*"]',
}


@dataclass(frozen=True)
class Origin:
    """Where an option that is left open has its default: a field of a component's config."""

    config: type
    name: str

    @property
    def default(self) -> Any:
        """The default that the component has."""
        found = {item.name: item for item in dataclasses.fields(self.config)}[self.name]
        return found.default


def option(default: Any, panel: str, text: str, shown: str = "") -> Any:
    """Return a dataclass field with its heading, its help text, and what to show as default where it is worked out."""
    return field(default=default, metadata={"panel": panel, "help": text, "shown": shown})


def from_config(config: type, name: str, panel: str, text: str, shown: str = "") -> Any:
    """Return a dataclass field whose default is that of a component's config."""
    usual = Origin(config, name).default
    return field(default=usual, metadata={"panel": panel, "help": text, "shown": shown})


def left_open(config: type, name: str, panel: str, text: str, shown: str = "") -> Any:
    """Return a field that is None until it is worked out, and then what a component's config has as its default.

    So it shows whether the option was given: one that would have no effect is refused only then.
    """
    origin = Origin(config, name)
    usual = "" if origin.default is None else str(origin.default)
    return field(default=None, metadata={"panel": panel, "help": text, "shown": shown or usual, "origin": origin})


def typed_with(name: str) -> Any:
    """Return a dataclass field that has no option of its own: its values are typed along with another's."""
    return field(default=(), metadata={"typed_with": name})


def kinds_of(settings: type) -> dict[str, Any]:
    """Return the type of every option of a settings class, by its name as typed (`round-to`)."""
    hints = typing.get_type_hints(settings)
    own = [item.name for item in dataclasses.fields(settings) if "typed_with" not in item.metadata]
    return {as_typed(name): _kind(hints[name]) for name in own}


def as_typed(name: str) -> str:
    """Return the name of an option as it is typed."""
    return name.replace("_", "-")


def _kind(hint: Any) -> Any:
    """Return the type of one value: without None, a tuple as a list, a choice of texts as a text."""
    for kind in (NumberOrAuto, WholeOrAuto):
        if hint == kind | None:
            return kind
    if typing.get_origin(hint) is tuple:
        return list[str]
    if typing.get_origin(hint) is Literal:
        return str
    inner = typing.get_args(hint)
    return _kind(inner[0]) if inner else hint


def require_kind(name: str, value: Any, kind: Any, where: str) -> None:
    """Raise InputError if a value read from a file is of another type than its option."""
    if not _fits(value, kind):
        raise InputError(f"{name} = {value!r}{where}: give {_KINDS[kind]}")


def _fits(value: Any, kind: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if kind == NumberOrAuto:
        return value == "auto" or _fits(value, float)
    if kind == WholeOrAuto:
        return value == "auto" or _fits(value, int)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


# -- sparsity: a number, and numbers for patterns of groups


def sparsities(value: Any, where: str) -> tuple[list[Any], list[str]]:
    """Take apart what may be one number, or a list of one number at most and of `PATTERN=NUMBER`, also as typed.

    `["0.5", "layer4.*=0.3"]` becomes `[0.5]` and `["layer4.*=0.3"]`.
    """
    words = value if isinstance(value, list) else [value]
    patterns = [word for word in words if isinstance(word, str) and "=" in word]
    numbers = [as_number(word) if isinstance(value, list) else word for word in words if word not in patterns]
    for word in patterns:
        share = as_number(word.rpartition("=")[2])
        if not isinstance(share, float) or not 0 <= share < 1:
            raise InputError(
                f"sparsity = {word!r}{where}: give PATTERN=NUMBER with a number in [0, 1), layer4.*=0.3 say"
            )
    if len(numbers) > 1:
        raise InputError(f"sparsity = {numbers}{where}: give one number, and PATTERN=NUMBER for single groups")
    return numbers, patterns


def as_written(words: list[str]) -> Any:
    """Return the values of `--sparsity` as `config.toml` holds them: a number, or a list with the number first."""
    values = sorted((as_number(word) for word in words), key=lambda value: isinstance(value, str))
    return values[0] if len(values) == 1 else values


def as_number(word: Any) -> Any:
    """Return a typed number as such, everything else as it is."""
    try:
        return float(word) if isinstance(word, str) else word
    except ValueError:
        return word


def numbers_or_auto(given: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return typed options whose words may be numbers, with the numbers as such."""
    read = dict(given)
    for name, word in given.items():
        if kinds.get(name) == NumberOrAuto:
            read[name] = as_number(word)
        elif kinds.get(name) == WholeOrAuto and isinstance(word, str) and word.removeprefix("-").isdecimal():
            read[name] = int(word)
    return read


# -- as text


def as_words(name: str, value: Any) -> list[str]:
    """Return what to type on the command line for one option."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [word for each in (value if isinstance(value, list) else [value]) for word in (f"--{name}", str(each))]


def to_toml(values: Mapping[str, Any]) -> str:
    """Return TOML, one line for each option."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items())


def _toml_value(value: Any) -> str:
    """Return a value as TOML; its strings are JSON's, but for one control character that JSON leaves bare."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the options that a TOML file holds, by name as typed.

    Raises:
        InputError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte-order mark
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; give a file with lines like: sparsity = 0.6"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is no TOML: {error}; give a file with lines like: sparsity = 0.6") from error
