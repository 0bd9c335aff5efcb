"""Sizes that follow tensors: attributes such as `in_channels`, numbers in a module's code, the memory of a parameter.

A cut narrows tensors; here is everything else that must have the same sizes afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressor.errors import InputError
from compressor.graph.attention import refit_attention
from compressor.graph.attributes import integer_attributes, numeric_attributes, set_numeric_attributes
from compressor.graph.recurrent import recurrent_sizes


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Put other memory, of another shape, behind a tensor that stays the same object; writes the tensor."""
    if tensor.requires_grad:
        # NOTE: A loss that is still referred to keeps its graph alive, and with it the node that accumulates this
        # parameter's gradient in the old shape. torch drops that node only when the type changes, so it does once.
        tensor.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
    tensor.data = data


def sync_size_attributes(model: nn.Module) -> None:
    """Set the size attributes of known modules (`in_channels`, `num_features`, ...) to those of their tensors."""
    with torch.no_grad():
        for module in model.modules():
            _refresh_made_weights(module)
            sizes = _sizes_of_tensors(module)
            changed = {name: value for name, value in sizes.items() if vars(module).get(name) != value}
            for name, value in changed.items():
                setattr(module, name, value)
            if changed and isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # on a GPU, cuDNN wants all weights in one piece of memory


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy.

    A weight that hooks make of others before each run (`weight_norm`) is made once more in the model, without the
    history that nobody can copy.
    """
    with torch.no_grad():
        for module in model.modules():
            _refresh_made_weights(module)
    return copy.deepcopy(model)


def restore_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Put memory of that shape, without values, behind every named parameter and buffer; writes the model.

    Size attributes follow, as `sync_size_attributes` does it.

    Raises:
        InputError: the model has other tensors than `shapes`, or one with another number of dimensions.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if differing := sorted(tensors.keys() ^ shapes.keys()):
        raise InputError(f"these shapes belong to another model: {differing[0]!r} is only in one of the two")
    # All checks before the first write: a model that is half another's would be of no use to anyone.
    for name, shape in shapes.items():
        if len(shape) != tensors[name].dim():
            dims = tensors[name].dim()
            raise InputError(f"{name!r} has {dims} dimensions, but the shape asked for is {tuple(shape)}")
    for name, shape in shapes.items():
        if tuple(shape) != tuple(tensors[name].shape):
            tensors[name].grad = None
            replace_data(tensors[name], tensors[name].data.new_empty(tuple(shape)))
    sync_size_attributes(model)


def named_model_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the parameters and buffers of named modules by their own names, parameters first, each tensor once."""
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        seen: set[int] = set()
        for prefix, module in modules.items():
            for name, tensor in getattr(module, kind).items():
                # A tensor that two modules share has the name that comes first, as in `model.named_parameters()`.
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}".removeprefix(".")] = tensor
    return found


def replace_size_attributes(module: nn.Module, changed: Mapping[int, int], *, in_sequences: bool) -> bool:
    """Change whole numbers among the attributes of a module along with sizes; writes the module.

    Code such as `x.view(b, n, self.num_heads, self.head_dim)` follows a cut only so. Whether a number really was that
    size shows when the cut is verified against the recording.

    Args:
        module: a module; torch's own, but for norms without weights, are left alone.
        changed: sizes that axes had in that module's own code, and what they are now.
        in_sequences: whether numbers in tuples and lists are changed, and the others left alone. A window of (3, 3) is
            seldom the 3 heads.

    Returns:
        Whether anything changed.
    """
    if not integer_attributes(module) & changed.keys():
        return False
    followed = _sizes_of_tensors(module).keys()  # of a subclass of torch's: these are those of its tensors already
    free = {
        name: value
        for name, value in numeric_attributes(module).items()
        if name not in followed and isinstance(value, tuple | list) == in_sequences
    }
    replaced = {name: _replaced(value, changed) for name, value in free.items()}
    set_numeric_attributes(module, replaced)
    return replaced != free


def _replaced(value: Any, sizes: Mapping[int, int]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_replaced(item, sizes) for item in value)
    return sizes.get(value, value) if type(value) is int else value


def _sizes_of_tensors(module: nn.Module) -> dict[str, Any]:
    """Return the size attributes of a module as its tensors have them."""
    if isinstance(module, nn.MultiheadAttention):
        return refit_attention(module)
    if isinstance(module, nn.RNNBase):
        return recurrent_sizes(module)
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if hasattr(type(module), "forward_split"):
        return _halves(module)
    weight = stored_weight(module)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        known = module.running_mean if module.running_mean is not None else weight
        return {"num_features": len(known)} if isinstance(known, Tensor) else {}
    if not isinstance(weight, Tensor):
        return {}
    if isinstance(module, nn.modules.conv._ConvNd):
        return _conv_sizes(module, weight)
    if isinstance(module, nn.Linear):
        return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": len(weight)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(weight)}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight.shape[1]}
    return {}


def _halves(module: nn.Module) -> dict[str, int]:
    """Return the width of what a block of Ultralytics splits in two.

    It halves what `cv1` gives by `chunk` as it runs, and by its number `c` in `forward_split`, which it exports:
    no run that a cut is held against would read it.
    """
    first = getattr(getattr(module, "cv1", None), "conv", None)
    weight = stored_weight(first) if isinstance(first, nn.Conv2d) else None
    return {"c": len(weight) // 2} if weight is not None and isinstance(vars(module).get("c"), int) else {}


def stored_weight(module: nn.Module) -> Tensor | None:
    """Return a module's weight; of one that is made of others only when it runs, the one that has its shape now."""
    if "parametrizations" in module._modules and is_parametrized(module, "weight"):
        # NOTE: Not `module.weight`: to ask spectral_norm for it in training is to take a step of its power iteration.
        made_of = dict(module.get_submodule("parametrizations.weight").named_parameters(recurse=False))
        return made_of.get("original", made_of.get("original1"))
    # NOTE: Where `module.weight` would look, but torch takes long to say of a module that it has none.
    places = (module._parameters, module._buffers, vars(module))
    return next((place[name] for name in _WEIGHTS for place in places if name in place), None)


_WEIGHTS = ("weight_orig", "weight_v", "weight")  # as prune and spectral_norm, and weight_norm, call what they replaced


def _refresh_made_weights(module: nn.Module) -> None:
    """Make a weight anew that hooks make of others before each run: until the next one it would have its old shape."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            setattr(module, hook._tensor_name, hook.apply_mask(module))  # type: ignore[no-untyped-call]
        elif isinstance(hook, WeightNorm):
            setattr(module, hook.name, hook.compute_weight(module))
        elif isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


def _conv_sizes(conv: nn.modules.conv._ConvNd, weight: Tensor) -> dict[str, int]:
    """Return the sizes of a convolution: depthwise ones lose blocks, other grouped ones get narrower blocks."""
    groups = conv.groups
    if conv.transposed:
        groups = weight.shape[0] if groups == conv.in_channels else groups
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * groups, "groups": groups}
    if groups > 1 and groups == conv.in_channels:
        groups = weight.shape[0] // (conv.out_channels // groups)
    return {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0], "groups": groups}
