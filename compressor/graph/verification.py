"""Run a model after a cut and hold every operation against the recording of the trace.

Where an operation treats positions alike whatever they are (a convolution, a sum), and its tensors come from where they
came from before, with the same arguments, its result follows from the recording and is not computed again. Where sizes
or positions stand in arguments (a view, a slice) the operation runs and its rule is applied anew.
"""

# A worked example: channel 2 of 4 is removed from h = relu(a(x)).view(1, 16), which then goes to a Linear (the example
# in `recorder.py`). The parameters have the shapes that the recording without class 2 has. Then, one by one:
#
#   0  aten.convolution   same origins and arguments: not run, the result is an empty (1, 3, 2, 2) tensor
#   1  aten.relu          likewise
#   2  aten.view          not equivariant: it runs, and torch refuses to view 12 numbers as (1, 16). The RuntimeError
#                         becomes Mismatch(..., index=2), and the cut is refused: "aten.view in the model does not
#                         follow the cut: RuntimeError: shape '[1, 16]' is invalid for input of size 12".
#
# With h.flatten(1) in its place the view runs as (1, 12), its rule returns [0 0 0 0 1 1 1 1 3 3 3 3], and `compare`
# finds the same in the recording.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from compressor.graph.calls import Call, comparable_args, partition_tensors
from compressor.graph.channel_graph import ChannelGraph
from compressor.graph.context import Axes, Origin
from compressor.graph.recorder import MASKED, Recorder, is_mask
from compressor.graph.recording import OpRecord, Recording, TensorRecord
from compressor.graph.replay import VIEWS, Mismatch, ReplayContext, compare

_META = torch.device("meta")
_VIEW_FUNCS = (torch.ops.aten.view, torch.ops.aten._unsafe_view)


def verify_against_recording(graph: ChannelGraph, recording: Recording) -> None:
    """Run the model after a cut and hold every operation against the trace: the same channels, less the removed ones.

    Args:
        graph: the graph as it was before the cut, of the model that is cut already.
        recording: the graph's recording without what the cut removed.

    Raises:
        Mismatch: an operation does not carry what the cut should leave; its `index` is the number of the operation.
    """
    context = ReplayContext(recording)
    verifier = VerifyingRecorder(graph.model, context, recording.log, recording=recording)
    try:
        verifier.check_parameters()
        verifier.run(graph.example_inputs, graph.outputs)
    except Mismatch:
        raise
    except Exception as failure:
        # Whatever the model's own code or torch raises here, it did not raise before the cut.
        raise Mismatch(f"{type(failure).__name__}: {failure}", context.index, context.module) from failure
    # A model that branches on values may run less behind the last channel, but not before it.
    required = recording.end if recording.is_data_dependent(context.index) else len(recording.log.records)
    if context.index < required:
        raise Mismatch("the cut model stops before this operation", context.index)


@dataclass(eq=False)
class VerifyingRecorder(Recorder):  # type: ignore[no-untyped-call]
    """A recorder that writes nothing, and compares."""

    context: ReplayContext
    recording: Recording = field(kw_only=True)
    _alive: list[Tensor] = field(default_factory=list)
    _copied: dict[Origin, Origin] = field(default_factory=dict)

    def check_parameters(self) -> None:
        """Raise Mismatch for a parameter or buffer that has not the shape that the cut should leave."""
        for name, slots in self.log.parameters.items():
            shape = tuple(self.tensors[name].shape)
            expected = self.recording.shape(TensorRecord(slots, shape, torch.float32, None))
            if list(shape) != expected:
                raise Mismatch(f"{name!r} has shape {shape}, not {tuple(expected)}", 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return an operation's result, from the recording where that is sure."""
        self._skip_copy(func)
        records, index = self.log.records, self.context.index
        if index < len(records) and records[index].equivariant and records[index].func is func:
            tensors, others = partition_tensors((args, kwargs or {}))
            if self._is_unchanged(records[index], tensors, comparable_args(records[index].op, others, tensors)):
                return self._result(records[index], tensors)
        if index >= self.recording.end and self.recording.is_data_dependent(index):
            return func(*args, **(kwargs or {}))  # no channel comes after this, and what runs may depend on values
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _skip_copy(self, func: Any) -> None:
        """Go past a copy that a reshape made before the cut: with one head left, memory lies as it is wanted."""
        records, index = self.log.records, self.context.index
        pair = records[index : index + 2]
        if len(pair) == 2 and pair[0].op == "aten.clone" and pair[1].op in VIEWS and func.overloadpacket in _VIEW_FUNCS:
            self._copied["op", index, 0] = pair[0].origins[0]
            self.context.index += 1

    def _is_unchanged(self, record: OpRecord, tensors: list[Tensor], non_tensor_args: tuple[Any, ...]) -> bool:
        """Return whether an operation gets what it got before the cut, less what was removed."""
        origins = self.context.origins
        return non_tensor_args == record.non_tensor_args and all(
            (origins.get(id(tensor)) or self._origin(tensor)) == self._copied.get(origin, origin)
            for tensor, origin in zip(tensors, record.origins, strict=True)
        )

    def _result(self, record: OpRecord, tensors: list[Tensor]) -> Any:
        results = [tensors[0]] if record.in_place else [self._empty_result(each) for each in record.results]
        for number, tensor in enumerate(results):
            self.context.set_origin(tensor, ("op", self.context.index, number))
        self._alive += results  # origins go by id, so no id may be given away twice
        self.context.index += 1
        return results[0] if len(results) == 1 else tuple(results)

    def _empty_result(self, record: TensorRecord) -> Tensor:
        shape = self.recording.shape(record)
        assert record.memory_order is not None
        # The same order in memory as before, or a later `view` would fail, or succeed, where it did not.
        strides = [0] * len(shape)
        stride = 1
        for dim in reversed(record.memory_order):
            strides[dim] = stride
            stride *= max(shape[dim], 1)
        return torch.empty_strided(shape, strides, dtype=record.dtype, device=_META)

    def _execute(self, op: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation; what depends on values is decided as before the cut."""
        records, index = self.log.records, self.context.index
        decision = records[index].decision if index < len(records) and records[index].op == op else None
        if decision is None:
            return super()._execute(op, func, args, kwargs)
        if op not in MASKED:
            return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, decision)
        masks = iter(decision)
        # The first argument is what is masked, and may be of whole numbers itself.
        rest = tree_map(lambda each: next(masks) if isinstance(each, Tensor) and is_mask(each) else each, args[1:])
        return super()._execute(op, func, (args[0], *rest), kwargs)

    def _record(self, call: Call, axes: list[Axes], results: list[Tensor], keeps_axes: bool, out: Any) -> int:
        """Compare instead of writing."""
        compare(self.recording, self.context.index, call.op, axes, results)
        self._require_same(self.log.records[self.context.index], call)
        self.context.index += 1
        return self.context.index - 1

    def _require_same(self, record: OpRecord, call: Call) -> None:
        """Refuse other tensors and other values than before: the model would compute something else.

        Whole numbers may differ where an operation has sizes among its arguments.
        """
        if self.recording.is_data_dependent(self.context.index):
            return
        if call.origins != tuple(self._copied.get(origin, origin) for origin in record.origins):
            raise Mismatch("it gets other tensors than before the cut", self.context.index)
        before, now = (_values(args, record.equivariant) for args in (record.non_tensor_args, call.non_tensor_args))
        if before != now:
            raise Mismatch(f"its arguments {before} became {now}: a value that depends on a size", self.context.index)


def _values(non_tensor_args: tuple[Any, ...], with_integers: bool) -> list[Any]:
    return [each for each in non_tensor_args if isinstance(each, float) or (with_integers and type(each) is int)]
