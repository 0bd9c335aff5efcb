"""Numbers among the attributes of modules: what a model's code may read sizes off.

They stand in the module itself, in tuples and lists, or in a configuration that modules share:

    self.heads = 4    self.split = [16, 48]    self.config.d_inner, read as "config.d_inner"

A number in a shared configuration is changed for one module alone: it gets a copy of the configuration.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

_NUMBERS = (int, float, bool)


def is_torch_module(module: nn.Module) -> bool:
    """Return whether a module's class comes with torch: its code and its attributes are known."""
    return type(module).__module__.startswith("torch.nn.")


def all_numeric_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the numbers of every module that has some, by its name; those of a shared configuration are left out."""
    modules = dict(model.named_modules())
    owners = Counter(id(holder) for module in modules.values() for _, holder in _configurations(module))
    found = {}
    for name, module in modules.items():
        shared = {f"{key}." for key, holder in _configurations(module) if owners[id(holder)] > 1}
        numbers = numeric_attributes(module)
        found[name] = {key: value for key, value in numbers.items() if not key.startswith(tuple(shared))}
    return {name: attributes for name, attributes in found.items() if attributes}


def numeric_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the public attributes of a module that are numbers, or tuples or lists of them; strings could name things.

    Those of a configuration have the name of both, with a point between.
    """
    found = {name: value for name, value in _public(module) if is_numeric(value) and name != "training"}
    for name, holder in _configurations(module):
        found |= {f"{name}.{key}": value for key, value in _public(holder) if is_numeric(value)}
    return found


def set_numeric_attributes(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Write numbers by the names of `numeric_attributes`; a configuration is copied before it is written."""
    now = numeric_attributes(module)
    for name, value in values.items():
        if name in now and now[name] == value and type(now[name]) is type(value):
            continue
        # A file has no lists beside tuples: what is a list stays one.
        kind = type(now.get(name))
        value = kind(value) if kind in (list, tuple) and isinstance(value, list | tuple) else copy.copy(value)
        holder, _, key = name.rpartition(".")
        if holder:
            vars(module)[holder] = copy.copy(vars(module)[holder])
            vars(vars(module)[holder])[key] = value
        else:
            setattr(module, key, value)


def integer_attributes(module: nn.Module) -> set[int]:
    """Return the whole numbers among a module's attributes that may say a size, also those inside tuples.

    Torch's own modules have such only where no tensor of theirs says it: a LayerNorm without weights.
    """
    if is_torch_module(module) and not is_bare_norm(module):
        return set()
    found = [value if isinstance(value, tuple | list) else (value,) for value in numeric_attributes(module).values()]
    return {value for values in found for value in values if type(value) is int}


def is_bare_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm of torch's that knows its width, and has no weights that say it."""
    norms = (nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
    return isinstance(module, norms) and module.weight is None


def is_numeric(value: object) -> bool:
    """Return whether a value is None, a number, or a tuple or list of numbers."""
    # `type(...) in`, not isinstance: an enum or a torch.Size is more than its number, and must not be rewritten.
    if type(value) in (tuple, list):
        return all(type(item) in _NUMBERS for item in value)  # type: ignore[attr-defined]
    return value is None or type(value) in _NUMBERS


def _public(holder: object) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(holder).items() if not name.startswith("_"))


def _configurations(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the objects among a module's attributes that have attributes themselves, and are no part of the model."""
    if is_torch_module(module):
        return
    for name, value in _public(module):
        plain = not isinstance(value, nn.Module | Tensor | type | ModuleType | dict) and not callable(value)
        if plain and hasattr(value, "__dict__"):
            yield name, value
