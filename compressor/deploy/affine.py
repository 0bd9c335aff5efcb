"""BatchNorm in an exported graph as what it is at run time: a factor and an offset for each channel.

    BatchNormalization(x; scale, bias, mean, var)   ->   x * factor + offset,   factor = scale / sqrt(var + eps)

torch's exporter folds those behind a convolution into its weights. What stays are those behind anything else (a
concatenation, say), which quantisation passes over and some engines compute on a slow path.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_PARTS = 5  # inputs: x, scale, bias, mean, variance


def replace_batch_norms(exported: Any) -> None:
    """Write every BatchNormalization of an `onnx_ir.Model` whose statistics are constants as a product and a sum."""
    for node in list(exported.graph):
        if (node.op_type, node.domain) == ("BatchNormalization", "") and len(node.inputs) == _PARTS:
            _replace(exported.graph, node)


def _replace(graph: Any, node: Any) -> None:
    from onnxscript import ir

    x, *known = node.inputs
    constants = [ir.convenience.get_const_tensor(each) for each in known]
    if x is None or x.shape is None or any(each is None for each in constants):
        return
    scale, bias, mean, variance = (each.numpy().astype(np.float64) for each in constants)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    factor = scale / np.sqrt(variance + epsilon)
    kind, along = constants[0].numpy().dtype, (-1, *[1] * (len(x.shape) - 2))
    values = {"factor": factor, "offset": bias - mean * factor}
    made = {}
    for name, each in values.items():
        tensor = ir.tensor(
            np.ascontiguousarray(each.reshape(along).astype(kind)), name=f"{node.outputs[0].name}.{name}"
        )
        made[name] = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(made[name])
    product = ir.node("Mul", [x, made["factor"]])
    sum_ = ir.node("Add", [product.outputs[0], made["offset"]], name=node.name)
    before = node.outputs[0]
    sum_.outputs[0].shape, sum_.outputs[0].type = before.shape, before.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product, sum_], [before], [sum_.outputs[0]])
    for each in known:
        if each.name in graph.initializers and not each.uses():
            del graph.initializers[each.name]
