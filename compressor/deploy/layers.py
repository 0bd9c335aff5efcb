"""The layers of a network as engines run them: a convolution with all that is fused behind it is one.

    conv1, bn1, relu        ->  one layer, 3 -> 64 channels, 7 x 7, map 112 x 112
    conv2, bn2, add, relu   ->  one layer

They are read off the channel graph's recording, with the widths as formulas in the groups' sizes, so that one list
holds for every cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from compressor._utils import named_tensors
from compressor.graph import ChannelGraph, Extent

# What can stand behind another operation and is measured with it: by name in the recording, the operator of ONNX and
# its attributes, from the recorded arguments.
_FOLLOWERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "aten.relu": ("Relu", ()),
    "aten.hardtanh": ("Clip", ("min", "max")),
    "aten.sigmoid": ("Sigmoid", ()),
    "aten.tanh": ("Tanh", ()),
    "aten.hardsigmoid": ("HardSigmoid", ()),
    "aten.hardswish": ("HardSwish", ()),
    "aten.silu": ("Swish", ()),
    "aten.elu": ("Elu", ()),
    "aten.leaky_relu": ("LeakyRelu", ("alpha",)),
    "aten.gelu": ("Gelu", ()),
}
_JOINING = {"aten.add": "Add", "aten.mul": "Mul"}
# What costs nothing at run time: folded, dropped, or a new view of the same numbers.
_FREE = {
    *("aten.native_batch_norm", "aten.t", "aten.transpose", "aten.view", "aten.flatten", "aten.dropout"),
    *("aten.unsqueeze", "aten.squeeze", "aten.detach", "aten.alias", "aten.expand", "aten.permute", "aten.clone"),
    *("aten._unsafe_view", "aten.reshape", "aten.contiguous", "aten.getitem"),
}


@dataclass(frozen=True)
class Follower:
    """An operator of ONNX behind a layer's own: its attributes, and whether a second tensor comes in from the side."""

    operator: str
    attributes: tuple[tuple[str, float], ...] = ()
    side: str = ""  # "map", of the same size, or "channel", one number for each


@dataclass(frozen=True)
class Kind:
    """Everything about a layer but its widths; two layers of one kind take equally long at equal widths.

    Attributes:
        operator: of ONNX: Conv, Gemm, MaxPool, AveragePool, ReduceMean, or Identity where only followers are.
        map: height and width of its input; (1, 1) of vectors.
        kernel, stride, padding, dilation: of two dimensions.
        groups: of a convolution; 0: as many as channels, depthwise.
        bias: whether it has one, a folded BatchNorm included.
        norm: whether a BatchNorm follows it, which engines fold and PyTorch runs.
        followers: what stands behind it.
    """

    operator: str
    map: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True
    norm: bool = False
    followers: tuple[Follower, ...] = ()

    @property
    def has_one_width(self) -> bool:
        """Whether as many channels go out as come in."""
        return self.operator not in ("Conv", "Gemm") or self.groups == 0


@dataclass(frozen=True)
class Layer:
    """One layer of a network: what it is, where, and its widths after any cut."""

    name: str
    kind: Kind
    inputs: Extent
    outputs: Extent


def fused_layers(graph: ChannelGraph) -> tuple[list[Layer], list[str]]:
    """Return the layers of a network in the order in which they run, and operations that no layer is made of.

    Args:
        graph: of a network of convolutions over two dimensions, pooling, linear layers, and what lies in between.
    """
    return _Reader(graph).read()


class _Reader:
    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.records = graph.recording.log.records
        self.tensors = {**dict(graph.model.named_parameters()), **dict(graph.model.named_buffers())}
        self.inputs = [tuple(tensor.shape) for _, tensor in named_tensors(graph.example_inputs)]
        self.readers: dict[int, list[int]] = {}
        for index, record in enumerate(self.records):
            for origin in record.origins:
                if origin[0] == "op":
                    self.readers.setdefault(int(origin[1]), []).append(index)
        self.taken: set[int] = set()

    def read(self) -> tuple[list[Layer], list[str]]:
        layers, unknown = [], []
        for index, record in enumerate(self.records):
            if index in self.taken or record.op in _FREE:
                continue
            made = self._own(index)
            if made is None:
                unknown.append(f"{record.op.removeprefix('aten.')} in {record.module or 'the model'}")
                continue
            kind, inputs, outputs = made
            followers, norm = self._followers(index)
            followers = [*kind.followers, *followers]
            kind = replace(kind, bias=kind.bias or norm, norm=norm, followers=tuple(followers))
            layers.append(Layer(record.module, kind, inputs, outputs))
        return layers, unknown

    # -- what begins a layer

    def _own(self, index: int) -> tuple[Kind, Extent, Extent] | None:
        record = self.records[index]
        result = record.results[0] if record.results else None
        if result is None or len(result.shape) not in (2, 4):
            return None
        if record.op == "aten.convolution":
            return self._convolution(index)
        if record.op in ("aten.addmm", "aten.mm", "aten.linear"):
            return self._linear(index)
        came = self._came_from(index)
        if came is None:
            return None
        shape, _ = came
        hw = (int(shape[2]), int(shape[3])) if len(shape) == 4 else (1, 1)
        width = self._extent(result.slots[1], result.shape[1])
        numbers = [each for each in record.non_tensor_args if isinstance(each, int | float)]
        if record.op.startswith(("aten.max_pool2d", "aten.avg_pool2d")) and len(shape) == 4:
            pair = [(int(numbers[2 * at]), int(numbers[2 * at + 1])) for at in range(min(3, len(numbers) // 2))]
            operator = "MaxPool" if "max" in record.op else "AveragePool"
            stride = pair[1] if len(pair) > 1 else pair[0]
            padding = pair[2] if len(pair) > 2 else (0, 0)
            return Kind(operator, hw, pair[0], stride, padding, bias=False), width, width
        if record.op in ("aten.mean", "aten._adaptive_avg_pool2d") and len(shape) == 4 and _is_one(result.shape[2:]):
            return Kind("ReduceMean", hw, bias=False), width, width
        if record.op == "aten._adaptive_avg_pool2d" and shape == result.shape:
            return Kind("Identity", hw, bias=False), width, width
        follower = self._follower(index, None)
        if follower is None:
            return None
        hw = (int(result.shape[2]), int(result.shape[3])) if len(result.shape) == 4 else (1, 1)
        return Kind("Identity", hw, bias=False, followers=(follower,)), width, width

    def _convolution(self, index: int) -> tuple[Kind, Extent, Extent] | None:
        record = self.records[index]
        came, weight = self._came_from(index), self._weight(index)
        args = [each for each in record.non_tensor_args if each is not None]
        if came is None or weight is None or weight.dim() != 4 or len(args) < 10 or args[6]:  # args[6]: transposed
            return None
        shape, slots = came
        result = record.results[0]
        # What a group's size decides is recorded as "channels".
        groups = 0 if args[9] == "channels" or (args[9] == shape[1] and args[9] > 1) else int(args[9])
        kind = Kind(
            "Conv",
            (int(shape[2]), int(shape[3])),
            (int(weight.shape[2]), int(weight.shape[3])),
            (int(args[0]), int(args[1])),
            (int(args[2]), int(args[3])),
            (int(args[4]), int(args[5])),
            groups,
            bias=len(record.origins) > 2,
        )
        return kind, self._extent(slots[1], shape[1]), self._extent(result.slots[1], result.shape[1])

    def _linear(self, index: int) -> tuple[Kind, Extent, Extent] | None:
        record = self.records[index]
        result = record.results[0]
        factors = record.input_slots[1:] if record.op == "aten.addmm" else record.input_slots
        if len(result.shape) != 2 or len(factors) < 2:
            return None
        weight = self._weight(index)
        if weight is None or weight.dim() != 2:
            return None
        has_bias = record.op == "aten.addmm" or len(record.origins) > 2
        inputs = self._extent(factors[0][1], int(weight.shape[1]))
        return Kind("Gemm", (1, 1), bias=has_bias), inputs, self._extent(result.slots[1], result.shape[1])

    def _weight(self, index: int) -> nn.Parameter | Any:
        """Return the first parameter of two dimensions or more that an operation reads, through a transposition too."""
        for origin in self.records[index].origins:
            while origin[0] == "op" and self.records[int(origin[1])].op in ("aten.t", "aten.transpose"):
                origin = self.records[int(origin[1])].origins[0]
            tensor = self.tensors.get(str(origin[1])) if origin[0] == "tensor" else None
            if tensor is not None and tensor.dim() >= 2:
                return tensor
        return None

    def _came_from(self, index: int) -> tuple[Sequence[int], Sequence[Any]] | None:
        """Return shape and slots of the first tensor that an operation computes with."""
        record = self.records[index]
        for origin, slots in zip(record.origins, record.input_slots, strict=False):
            if origin[0] == "op":
                return self.records[int(origin[1])].results[int(origin[2])].shape, slots
            if origin[0] == "input":
                return self.inputs[int(origin[1])], slots
        return None

    def _extent(self, slot: Any, size: int) -> Extent:
        return self.graph.extent(slot, int(size))

    # -- what is fused behind it

    def _followers(self, index: int) -> tuple[list[Follower], bool]:
        """Return what stands behind an operation and nowhere else, and whether a BatchNorm is among it."""
        found: list[Follower] = []
        biased = False
        at = index
        while len(readers := self.readers.get(at, [])) == 1:
            after = readers[0]
            if after in self.taken:
                break
            if self.records[after].op in ("aten.native_batch_norm", "aten.dropout"):
                biased = biased or self.records[after].op == "aten.native_batch_norm"
            else:
                follower = self._follower(after, at)
                if follower is None:
                    break
                found.append(follower)
            self.taken.add(after)
            at = after
        return found, biased

    def _sources(self, index: int) -> list[int]:
        return [int(origin[1]) for origin in self.records[index].origins if origin[0] == "op"]

    def _follower(self, index: int, behind: int | None) -> Follower | None:
        record = self.records[index]
        if record.op in _FOLLOWERS:
            operator, names = _FOLLOWERS[record.op]
            values = [float(each) for each in record.non_tensor_args if isinstance(each, int | float)]
            return Follower(operator, tuple(zip(names, values, strict=False)))
        if record.op not in _JOINING or len(record.origins) != 2 or record.origins[0] == record.origins[1]:
            return None
        if not all(origin[0] == "op" for origin in record.origins):
            return None
        shapes = [self.records[int(o[1])].results[int(o[2])].shape for o in record.origins]
        if any(len(shape) != 4 for shape in shapes):
            return Follower(_JOINING[record.op], (), "map") if shapes[0] == shapes[1] else None
        if shapes[0] != shapes[1]:  # a scale for each channel, of squeeze and excitation
            return None if behind is not None else Follower(_JOINING[record.op], (), "channel")
        # The later of two branches waits for the other: the sum is fused into its last convolution.
        if behind is not None and behind != max(self._sources(index)):
            return None
        return Follower(_JOINING[record.op], (), "map")


def _is_one(sizes: Sequence[int]) -> bool:
    return all(size == 1 for size in sizes)
