"""What the layers of a model read and return, one at a time, and what is added to it.

    out = relu(bn(conv(x)) + x)     conv reads x and returns a tensor; bn is its norm; x is added to what bn makes of it

A forward pass is left as soon as the layer has run, or its output was added: what comes after is not asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor._utils import device_of, run_batch, run_model, to_device

MOST_FEATURES = 6_000  # of one output: the solution takes the third power of it

BatchNorm = nn.modules.batchnorm._BatchNorm
_FITTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass
class Layer:
    """A layer that can be fitted.

    Attributes:
        name: of the module.
        norm: the BatchNorm that reads its output, if one does.
        is_added: whether the output, or that of its BatchNorm, is added to another tensor (a residual connection).
    """

    name: str
    norm: str | None = None
    is_added: bool = False


def fittable_layers(model: nn.Module, batch: Any) -> list[Layer]:
    """Return the layers that can be fitted, in the order in which they run."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    names = {
        module: name
        for name, module in model.named_modules()
        if type(module) in _FITTED and (weight := module._parameters.get("weight")) is not None
        if uses[id(weight)] == 1 and weight[0].numel() <= MOST_FEATURES
    }
    norms = {module: name for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    found: dict[str, Layer] = {}
    runs: Counter[str] = Counter()
    outputs: list[tuple[Tensor, Layer]] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in names:
            runs[names[module]] += 1
            outputs.append((output, found.setdefault(names[module], Layer(names[module]))))
        for layer in [layer for each, layer in outputs if each is inputs[0]] if module in norms else ():
            layer.norm = norms[cast(BatchNorm, module)]
            outputs.append((output, layer))

    def added(tensor: Tensor, other: Tensor) -> None:
        for layer in (layer for each, layer in outputs if each is tensor):
            layer.is_added = True

    with ExitStack() as hooks:
        for module in (*names, *norms):
            hooks.callback(module.register_forward_hook(look).remove)
        hooks.enter_context(_Additions(added))
        run_batch(model, batch)
    return [layer for name, layer in found.items() if runs[name] == 1]


class _Additions(TorchFunctionMode):
    """Inside this `with`, every addition of two tensors of one shape is reported, for both of them, before it is made.

    Before, because `out += x` leaves nothing of what `out` was.
    """

    _NAMES = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})

    def __init__(self, report: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look, and let the function do what it does."""
        if getattr(func, "__name__", "") in self._NAMES and len(args) > 1:
            one, other = args[:2]
            if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and not kwargs:
                self._report(one, other)
                self._report(other, one)
        return func(*args, **(kwargs or {}))


class _Reached(Exception):
    """Raised where a layer has run: what comes after it need not."""


@dataclass
class Seen:
    """What a layer reads and returns, and what is added to that, or to what BatchNorm makes of it."""

    read: Any = None
    returned: Any = None
    sum_with: Tensor | None = None


def seen_by(model: nn.Module, layer: Layer, batch: Any) -> Seen | None:
    """Run a model as far as one layer; None where it takes no single tensor."""
    seen = Seen()
    outputs: list[Any] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if module is here:
            # A copy, because an addition in place may overwrite it.
            seen.read, seen.returned = inputs[0] if inputs else None, output.clone() if layer.is_added else output
        outputs.append(output)
        if not layer.is_added:
            raise _Reached

    def added(tensor: Tensor, other: Tensor) -> None:
        if any(each is tensor for each in outputs):
            seen.sum_with = other
            raise _Reached

    here = model.get_submodule(layer.name)
    with ExitStack() as hooks:
        hooks.callback(here.register_forward_hook(look).remove)
        if layer.is_added:
            if layer.norm:
                hooks.callback(model.get_submodule(layer.norm).register_forward_hook(look).remove)
            hooks.enter_context(_Additions(added))
        hooks.enter_context(suppress(_Reached))
        run_model(model, to_device(batch, device_of(model)))
    return seen if isinstance(seen.read, Tensor) and isinstance(seen.returned, Tensor) else None
