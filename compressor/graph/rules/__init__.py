"""How channels flow through one operation: one plain function per op, all in one visible dict.

A rule is `rule(context, out, *args, **kwargs)`: `out` is the operation's result (its shape is what counts, it may have
no data), the rest are the arguments that it got. It returns the axes of the result: a tuple of axes, or a list of such
tuples where the operation returns several tensors. An operation in neither table is unknown: every channel that
reaches it is frozen, by name and with the shape.

Teach an operation:

    compressor.RULES["aten.foo"] = my_rule
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from compressor.graph.context import Rule
from compressor.graph.rules import indexing, matmul, norm, pointwise, reduce, shape, space

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **matmul.RULES,
    **norm.RULES,
    **reduce.RULES,
    **space.RULES,
    **shape.RULES,
    **indexing.RULES,
}

# An operation is equivariant if removing channels from its tensors, with the same other arguments, removes them from
# the axes of its results and changes nothing else there. After a cut its result is known without running it, which is
# most of what makes a verification cheap. These are not: the first have sizes or numbers of blocks among their
# arguments, the second return seeds, or their own input, among their results.
_EXCEPT_RULES = (pointwise.filled, norm.group_norm, norm.layer_norm, matmul.deform_conv2d)
_EXCEPT_OPS = ("aten._scaled_dot_product_flash_attention", "aten.native_dropout")

_EQUIVARIANT: Mapping[str, Rule] = MappingProxyType(
    {
        **{
            name: rule
            for table in (pointwise.RULES, matmul.RULES, norm.RULES, reduce.RULES, space.RESIZING)
            for name, rule in table.items()
            if rule not in _EXCEPT_RULES and name not in _EXCEPT_OPS
        },
        **{f"aten.{name}": shape.RULES[f"aten.{name}"] for name in ("permute", "transpose", "t", "unsqueeze")},
        **{f"aten.{name}": shape.RULES[f"aten.{name}"] for name in ("cat", "stack", "flip", "glu")},
    }
)


def is_equivariant(op: str, non_tensor_args: Sequence[object]) -> bool:
    """Return whether an operation treats positions alike whatever they are.

    With the same arguments that are no tensors, a channel that is removed from its tensors is then removed from its
    results, and nothing else changes. A convolution in blocks is not, unless every channel is a block: their number is
    an argument.
    """
    return (
        op in _EQUIVARIANT
        and RULES.get(op) is _EQUIVARIANT[op]  # of a rule that a user has put there we know nothing
        and (op != "aten.convolution" or non_tensor_args[-1] in (1, "channels"))
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
        "aten.sym_size": "returns a number, no tensor",
        "aten.record_stream": "memory management",
    }
)
