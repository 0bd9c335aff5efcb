"""How channels flow through one operation: one plain function per op, all in one visible dict.

A rule is `rule(flow, out, *args, **kwargs)`: `out` is the operation's result (its shape is what counts, it may have no
data), the rest are the arguments that it got. It returns the axes of the result: a tuple of axes, or a list of such
tuples where the operation returns several tensors. An operation in neither table is unknown: every channel that
reaches it is frozen, by name and with the shape.

Teach an operation:

    compressor.RULES["aten.foo"] = my_rule
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from compressor.graph.context import Rule
from compressor.graph.rules import indexing as number
from compressor.graph.rules import matmul as contract
from compressor.graph.rules import norm, pointwise, reduce, shape, space

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **contract.RULES,
    **norm.RULES,
    **reduce.RULES,
    **space.RULES,
    **shape.RULES,
    **number.RULES,
}

# Sizes or numbers of blocks are among the arguments of these; these give numbers, or their own input, among results.
_UNSTEADY_RULES = (pointwise.filled, norm.group_norm, norm.layer_norm, contract.deform_conv2d)
_UNSTEADY = ("aten._scaled_dot_product_flash_attention", "aten.native_dropout")

_STEADY: Mapping[str, Rule] = MappingProxyType(
    {
        **{
            name: rule
            for table in (pointwise.RULES, contract.RULES, norm.RULES, reduce.RULES, space.RESIZING)
            for name, rule in table.items()
            if rule not in _UNSTEADY_RULES and name not in _UNSTEADY
        },
        **{f"aten.{name}": shape.RULES[f"aten.{name}"] for name in ("permute", "transpose", "t", "unsqueeze")},
        **{f"aten.{name}": shape.RULES[f"aten.{name}"] for name in ("cat", "stack", "flip", "glu")},
    }
)


def is_steady(name: str, plain: Sequence[object]) -> bool:
    """Tell whether an operation treats positions alike whatever they are.

    With the same arguments that are no tensors, a channel that is gone from its tensors is then gone from its results,
    and nothing else changes. A convolution in blocks is not, unless every channel is a block: their number is an
    argument.
    """
    return (
        name in _STEADY
        and RULES.get(name) is _STEADY[name]
        and (name != "aten.convolution" or plain[-1] in (1, "channels"))
    )


# Operations whose result has a size, or is a number, that depends on values: what follows them may change with these.
DATA_DEPENDENT = frozenset(
    f"aten.{name}"
    for name in (
        *("nonzero", "nonzero_static", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
        *("bincount", "_local_scalar_dense", "item", "is_nonzero", "equal"),
    )
) | {"torchvision.nms"}

IGNORED = MappingProxyType(
    {
        "aten._assert_async": "checks a value, returns nothing",
        "aten._assert_scalar": "checks a value, returns nothing",
        "aten._assert_tensor_metadata": "checks a type, returns nothing",
        "aten.sym_size": "gives a number, no tensor",
        "aten.record_stream": "memory management",
    }
)
