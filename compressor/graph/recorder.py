"""Sees every operation of a model that runs, runs it without data, applies its rule and writes the recording."""

# A worked example: what is written for h = relu(a(x)).view(1, 16) with a convolution a (3 -> 4, 1 x 1, no bias) on one
# image of 2 x 2. Slots are those of the example in `recording.py`; "-" is UNPRUNABLE and "*" is BROADCAST.
#
#   no.  op                module  origins                             input_slots            results      equivariant
#   0    aten.convolution  "a"     ("input", 0) ("tensor", a.weight)   (* - - -) (0 1 * *)    (* 0 - -)    True
#   1    aten.relu         ""      ("op", 0, 0)                        (* 0 - -)              (* 0 - -)    True
#   2    aten.view         ""      ("op", 1, 0)                        (* 0 - -)              (* 2)        False
#
# The view is not equivariant: its arguments (1, 16) contain a size that a cut may have to change.

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from compressor._utils import as_arguments
from compressor.errors import failed_axis_rule, no_axis_rule
from compressor.graph.attributes import integer_attributes
from compressor.graph.axes import BROADCAST, unlabeled
from compressor.graph.calls import Call, comparable_args, memory_order, partition_tensors, tensors_in
from compressor.graph.context import Axes, Origin, Rule, TensorInfo, TraceContext
from compressor.graph.environment import compiled_parts_eager, decomposed_layers, module_names, preserve_module_state
from compressor.graph.meta_kernels import META_KERNELS
from compressor.graph.recording import OpLog, OpRecord, TensorRecord
from compressor.graph.replay import Mismatch
from compressor.graph.rules import DATA_DEPENDENT, IGNORED, RULES, is_equivariant
from compressor.graph.rules.pointwise import filled
from compressor.graph.sizes import named_model_tensors

logger = logging.getLogger(__name__)

# A run leaves torch's switches and random states as they were, which two at once would not.
_ONE_RUN_AT_A_TIME = threading.RLock()
NOTHING_FOUND = "met a tensor without elements (give an example on which the model finds something)"
_CONSTANT_NUMEL = 1 << 20  # constants up to here keep their data: tables of positions, masks
_SAME_VALUES = ("t", "transpose", "permute", "view", "alias", "detach", "_to_copy", "clone", "squeeze", "unsqueeze")
_REORDERS = {f"aten.{name}" for name in _SAME_VALUES}
_COMPARED_NUMEL = 64  # constants up to here are compared by value after a cut: a factor such as width ** -0.5


@dataclass(eq=False)
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs a model once, on tensors without data where `log.meta` says so, and notes everything in context and log.

    Attributes:
        model: the model, whose parameters and buffers are known by name.
        context: what the rules write.
        log: the recording that grows.
        tensors: the model's parameters and buffers by name, each once.
    """

    model: nn.Module
    context: TraceContext
    log: OpLog
    tensors: dict[str, Tensor] = field(init=False)
    _modules: dict[str, nn.Module] = field(init=False)
    _owned: Mapping[int, str] = field(init=False)
    _stand_ins: dict[int, Tensor] = field(default_factory=dict)
    _originals: list[Tensor] = field(default_factory=list)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would wrap every operation in `torch._dynamo`, whose import takes seconds."""
        return False

    def __post_init__(self) -> None:
        """Set up the dispatch mode, and find the model's tensors by their names."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules = dict(self.model.named_modules())
        self.tensors = named_model_tensors(self._modules)
        self._owned = {id(tensor): name for name, tensor in self.tensors.items()}
        self.context.buffers = {name for name, tensor in self.tensors.items() if not isinstance(tensor, nn.Parameter)}
        self.context.has_size_attribute = _SizeAttributes(self._modules, self.context)

    def run(self, example_inputs: Any, outputs: Callable[[Any], Any] | None = None, *, training: bool = False) -> None:
        """Run the model, in evaluation mode unless `training`; what it returns is frozen as its output.

        Args:
            example_inputs: as for `trace`.
            outputs: returns what counts of what the model returns; None for everything.
            training: whether to run in training mode.
        """
        args, kwargs = as_arguments(tree_map(self._input, example_inputs))
        modules = self._modules
        with (
            _ONE_RUN_AT_A_TIME,
            preserve_module_state(self.model, training),
            decomposed_layers(modules),
            compiled_parts_eager(modules),
            module_names(modules, self.context),
            self,
        ):
            result = self.model(*args, **kwargs)
            results = list(tensors_in(outputs(result) if outputs else result))  # here, as generators run by being read
        self.context.op = self.context.module = ""
        for tensor in results:
            self.context.freeze(self.context.axes(tensor), "model output")
        for note in self.context.notes.values():
            logger.warning(note)

    def _input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        origin = ("input", len(self.context.origins))
        return self._traced(value, TensorInfo(tuple(unlabeled(size) for size in value.shape)), origin)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        op, rule = _rule_of(func)
        tensors, others = partition_tensors((args, kwargs))
        if rule is filled and args and isinstance(args[0], list) and 0 in args[0]:
            return func(*args, **kwargs)  # nothing is in it; every BatchNorm makes one
        if rule is not filled and not any(self._takes_part(tensor, func) for tensor in tensors):
            return self._constant(func, args, kwargs, bool(tensors))
        # What we have no rule for may consist of operations that we have one for (inference mode sees whole ones).
        if rule is None and op not in IGNORED:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = [tensor if self.context.is_traced(tensor) else self._stand_in(tensor) for tensor in tensors]
        if any(map(operator.is_not, inputs, tensors)) or any(isinstance(value, torch.device) for value in others):
            args, kwargs = self._with_stand_ins(args), self._with_stand_ins(kwargs)
        out = self._execute(op, func, args, kwargs)
        if op not in IGNORED:
            self._apply(self._call(func, op, inputs, others), rule, args, kwargs, out)
        return out

    def _call(self, func: Any, op: str, inputs: list[Tensor], others: list[Any]) -> Call:
        # Before the rule is applied: an operation in place writes new axes over those of its input.
        origins = tuple(self.context.origins.get(id(tensor)) or self._origin(tensor) for tensor in inputs)
        input_axes = tuple(self.context.axes(tensor) for tensor in inputs)
        return Call(func, op, comparable_args(op, others, inputs), inputs, origins, input_axes)

    def _execute(self, op: str, func: Any, args: Any, kwargs: Any) -> Any:
        kernel = META_KERNELS.get(op) if self.log.meta else None
        out = kernel(*args, **kwargs) if kernel else NotImplemented
        if out is NotImplemented:
            return func(*args, **kwargs)
        return args[0] if _is_mutable(func) else out

    # -- which tensors have no data

    def _takes_part(self, tensor: Tensor, func: Any) -> bool:
        """Return whether an operation on this tensor belongs to the run, and not to the making of a constant."""
        # Integer buffers are constants (tables of positions) until something writes them: a counter must not count.
        is_written = id(tensor) in self._owned and _is_mutable(func)
        is_weight = id(tensor) in self._owned and tensor.is_floating_point()
        return self.context.is_traced(tensor) or is_weight or is_written

    def _with_stand_ins(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if self.context.is_traced(value) else self._stand_in(value)
        if isinstance(value, list | tuple):
            return type(value)(self._with_stand_ins(each) for each in value)
        if isinstance(value, dict):
            return {key: self._with_stand_ins(each) for key, each in value.items()}
        return torch.device("meta") if isinstance(value, torch.device) and self.log.meta else value

    def _stand_in(self, value: Tensor) -> Tensor:
        if id(value) in self._stand_ins:
            return self._stand_ins[id(value)]
        name = self._owned.get(id(value))
        stand_in = self._traced(value, None if name else self.context.info(value), self._origin(value))
        if name:
            self.context.label_parameter(stand_in, name, value.shape)
            self.context.keep_values(stand_in, value)
        self._stand_ins[id(value)] = stand_in
        self._originals.append(value)  # stand-ins go by id, so no id may be given away twice
        return stand_in

    def _origin(self, tensor: Tensor) -> Origin:
        """Return where a tensor comes from that no recorded operation made; of a small constant, also its values."""
        name = self._owned.get(id(tensor))
        if name:
            return ("tensor", name)
        # What is expanded counts once: a kernel that is expanded to all channels stays the same when some are cut.
        for dim, stride in enumerate(tensor.stride() if tensor.layout == torch.strided else ()):
            tensor = tensor.narrow(dim, 0, 1) if stride == 0 and tensor.shape[dim] > 1 else tensor
        small = tensor.numel() <= _COMPARED_NUMEL and not tensor.is_meta
        return ("constant", tuple(tensor.shape), str(tensor.tolist()) if small else None)

    def _traced(self, tensor: Tensor, info: TensorInfo | None, origin: Origin) -> Tensor:
        """Return the tensor that takes part in the run for this one."""
        stand_in = tensor.detach()
        if self.log.meta:
            stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.context.origins[id(stand_in)] = origin
        self.context.set_labels(stand_in, info or self.context.info(stand_in))
        return stand_in

    def _constant(self, func: Any, args: Any, kwargs: dict[str, Any], from_tensors: bool) -> Any:
        """Run an operation on constants alone; large or random results lose their data."""
        if not self.log.meta or from_tensors:
            return func(*args, **kwargs)
        result = func(*args, **{**kwargs, "device": torch.device("meta")}) if "device" in kwargs else None
        if isinstance(result, Tensor) and result.numel() > _CONSTANT_NUMEL:
            return self._traced(result, None, self._origin(result))
        # A model that asks for `x.device` gets meta, where its small tables would lose the values that indexing needs.
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)

    # -- rules

    def _apply(self, call: Call, rule: Rule | None, args: Any, kwargs: Any, out: Any) -> None:
        context, inputs = self.context, call.inputs
        context.op = call.op
        context.count_use(inputs)
        results = partition_tensors(out)[0]
        self._freeze_empty(inputs)
        returned_axes = len(context.labels.journal)
        axes, understood = self._axes(rule, args, kwargs, out, results, inputs)
        weight = context.main_weight(inputs)
        unchanged = len(inputs) == 1 and call.op in _REORDERS and context.info(inputs[0]).unchanged
        is_own_weight = call.op == "aten.convolution" and context.info(inputs[1]).unchanged
        produced_by = context.weight(inputs[1]) if is_own_weight else None
        product_of = self._product_of(call)
        for tensor, each in zip(results, axes, strict=True):
            context.set_labels(tensor, TensorInfo(each, weight, unchanged, produced_by, product_of))
        if call.op == "aten.add" and len(inputs) == 2 and kwargs.get("alpha", 1) == 1:
            context.remember_added_bias(*inputs)
        keeps_axes = understood and len(context.labels.journal) == returned_axes
        index = self._record(call, axes, results, keeps_axes, out)
        context.origins.update({id(tensor): ("op", index, number) for number, tensor in enumerate(results)})

    def _product_of(self, call: Call) -> str | None:
        """Return the weight of a matrix product whose result this is, in its own shape."""
        if call.op == "aten.mm":
            factor = self.context.info(call.inputs[1])
            return factor.weight if factor.unchanged else None
        return self.context.info(call.inputs[0]).product_of if call.op == "aten._unsafe_view" else None

    def _record(self, call: Call, axes: list[Axes], results: list[Tensor], keeps_axes: bool, out: Any) -> int:
        """Write a record into the log and return its number; `keeps_axes` where the rule made no axes of its own."""
        log = self.log
        tensor_records = tuple(_tensor_record(log, each, tensor) for each, tensor in zip(axes, results, strict=True))
        # A verification may only skip an operation if sizes and memory of its results follow from the axes alone.
        predictable = all(map(_has_known_memory, tensor_records))
        predictable = predictable and all(map(_has_known_sizes, call.input_axes, call.inputs))
        record = OpRecord(
            func=call.func,
            op=call.op,
            module=self.context.module,
            non_tensor_args=call.non_tensor_args,
            origins=call.origins,
            input_slots=tuple(log.slots(each) for each in call.input_axes),
            results=tensor_records,
            in_place=bool(results) and bool(call.inputs) and results[0] is call.inputs[0],
            equivariant=log.meta and keeps_axes and predictable and is_equivariant(call.op, call.non_tensor_args),
            decision=None if log.meta else _decision(call, out),
        )
        if log.data_dependent_from is None and _depends_on_data(call):
            log.data_dependent_from = len(log.records)
        log.records.append(record)
        return len(log.records) - 1

    def _axes(
        self, rule: Rule | None, args: Any, kwargs: Any, out: Any, results: list[Tensor], inputs: list[Tensor]
    ) -> tuple[list[Axes], bool]:
        """Apply the rule; where there is none, or it does not fit, nothing that reaches the operation can be cut."""
        problem = ""
        try:
            found = rule(self.context, out, *args, **kwargs) if rule else None
            axes = [found] if isinstance(found, tuple) else found
            if axes is not None and _fits(axes, results):
                return axes, True
            if rule:
                problem = f"it returned {_described(axes)} for {_described(results)}"
        except Mismatch:
            raise
        except Exception as failure:
            # A rule is a guest, perhaps taught by a user, and may fail halfway: what it tied stays tied, which is on
            # the safe side, and everything that reaches the operation is frozen.
            problem = f"{type(failure).__name__}: {failure}"
        self._freeze_all(inputs, problem)
        return [tuple(unlabeled(size) for size in tensor.shape) for tensor in results], False

    def _freeze_empty(self, inputs: list[Tensor]) -> None:
        """Freeze channels of tensors without elements: what becomes of them did not show in this run."""
        for tensor in inputs:
            if tensor.numel() == 0 and any(isinstance(axis, np.ndarray) for axis in self.context.axes(tensor)):
                self.context.freeze(self.context.axes(tensor), f"{NOTHING_FOUND}, input shape {tuple(tensor.shape)}")

    def _freeze_all(self, inputs: list[Tensor], problem: str) -> None:
        """Freeze the channels that reach an operation without a rule, or with one that failed; note it once."""
        context = self.context
        reason = f"its axis rule failed ({problem})" if problem else "no axis rule for this operation"
        for tensor in inputs:
            axes = context.axes(tensor)
            shape = tuple(tensor.shape)
            context.freeze(axes, f"{reason}, input shape {shape}")
            if any(isinstance(axis, np.ndarray) for axis in axes):  # else nothing is lost, and nothing to be said
                where = (context.op, context.module, shape)
                context.note(context.op, failed_axis_rule(*where, problem) if problem else no_axis_rule(*where))


def _rule_of(func: Any) -> tuple[str, Rule | None]:
    """Return the name of an operation without its overload, and its rule. In-place ones go by the plain name."""
    name = _name_of(func)
    if name not in RULES and _is_mutable(func):
        name = name.removesuffix("_")
    return name, RULES.get(name)


# Remembered, for torch takes long to tell of a schema.
@cache
def _name_of(func: Any) -> str:
    return f"{func.namespace}.{func._schema.name.partition('::')[2]}"


@cache
def _is_mutable(func: Any) -> bool:
    """Return whether an operation writes into one of its arguments."""
    return bool(func._schema.is_mutable)


def _fits(axes: list[Axes], results: list[Tensor]) -> bool:
    """Return whether a rule returned one axis for every dimension of every result, of the right length."""
    return len(axes) == len(results) and all(
        len(each) == tensor.dim()
        and all(
            not isinstance(axis, np.ndarray) or len(axis) == size for axis, size in zip(each, tensor.shape, strict=True)
        )
        for each, tensor in zip(axes, results, strict=True)
    )


def _described(values: Any) -> str:
    """Return what a rule returned, or a result's shape, in few words for a message."""
    if not isinstance(values, list):
        return repr(type(values).__name__)
    return ", ".join(str(tuple(each.shape)) if isinstance(each, Tensor) else f"{len(each)} axes" for each in values)


def _depends_on_data(call: Call) -> bool:
    return call.op in DATA_DEPENDENT or (call.op in MASKED and any(map(is_mask, call.inputs[1:])))


def _decision(call: Call, out: Any) -> Any:
    """Return what an operation decided by values: its result, or the masks among its arguments."""
    if call.op in DATA_DEPENDENT:
        return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, out)
    masks = [each.clone() for each in call.inputs[1:] if is_mask(each)] if call.op in MASKED else []
    return masks or None


MASKED = ("aten.index", "aten.index_put", "aten._index_put_impl", "aten.masked_scatter")


def is_mask(index: Tensor) -> bool:
    """Return whether an index says of every position whether it is taken."""
    return index.dtype in (torch.bool, torch.uint8)


def _tensor_record(log: OpLog, axes: Axes, tensor: Tensor) -> TensorRecord:
    return TensorRecord(log.slots(axes), tuple(tensor.shape), tensor.dtype, memory_order(tensor))


def _has_known_memory(record: TensorRecord) -> bool:
    """Return whether the memory of a result follows from its axes."""
    return record.memory_order is not None and all(
        size == 1 or slot is not BROADCAST for slot, size in zip(record.slots, record.shape, strict=True)
    )


def _has_known_sizes(axes: Axes, tensor: Tensor) -> bool:
    """Return whether the size of every dimension follows from its axis; an expanded one can have any."""
    return all(size == 1 or axis is not BROADCAST for axis, size in zip(axes, tensor.shape, strict=True))


class _SizeAttributes:
    """Tells whether the running module has an attribute of this value: then a size in its code may follow a cut."""

    def __init__(self, modules: Mapping[str, nn.Module], context: TraceContext) -> None:
        self._modules = modules
        self._context = context
        self._values: dict[str, set[int]] = {}

    def __call__(self, value: int) -> bool:
        name = self._context.module
        if name not in self._values:
            self._values[name] = integer_attributes(self._modules[name])
        return value in self._values[name]
