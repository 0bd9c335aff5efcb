"""ONNX behind a parity gate: a file takes its place only after onnxruntime gave PyTorch's outputs with it.

    report = compressor.export_onnx(model, "small.onnx", example_inputs)

The file has a dynamic batch size, holds its weights itself, and knows nothing of the machine that made it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from compressor._utils import (
    as_arguments,
    atomic_write,
    batch_size,
    device_of,
    eval_mode,
    named_tensors,
    to_device,
    unwrap_compiled,
)
from compressor.deploy.affine import replace_batch_norms
from compressor.deploy.parity import UnequalError, compare, first_line, random_like, returned_names
from compressor.errors import ExportError, InputError, ParityError, RangeError

OPSETS = range(18, 24)  # 18 is what torch's exporter speaks itself; onnxruntime 1.23 reads up to 23
LARGEST_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; the rest is for the graph


@dataclass(frozen=True)
class ExportReport:
    """An ONNX file that passed the gate.

    Attributes:
        path: the file.
        size_bytes: its size.
        opset: version of the ONNX operators in it.
        max_abs_difference: largest difference from PyTorch, over all outputs, inputs and batch sizes.
        relative: largest difference as a share of its output's largest absolute value; at most 1e-4.
        images: how many examples were compared, the random ones included.
        top1_agreement: share of them with the same top-1 class, in [0, 1]; below 1 only where two classes tie within
            the tolerance. NaN where the first output is not a table of class scores `(B, classes)`.
        providers: where it ran, each compared: onnxruntime's providers, OpenVINO.
    """

    path: Path
    size_bytes: int
    opset: int
    max_abs_difference: float
    relative: float
    images: int
    top1_agreement: float
    providers: tuple[str, ...]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    opset: int = OPSETS[0],
    check_inputs: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write a model as ONNX, in evaluation mode and with a dynamic batch size, and prove that it is the model.

    onnxruntime is held against PyTorch on seven random examples and on `check_inputs`, at batch sizes 1 and 7, on the
    CPU and on a GPU where there is one, and OpenVINO where it is installed: every output within 1e-4 of its scale (in
    half precision eight units in the last place), and the same top-1 class wherever the model's own choice is clearer
    than that. The model is left as it was.

    Args:
        model: any module that `torch.export` can follow.
        path: where the file goes; one that is there already is replaced only by one that passed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the first dimension of every
            tensor is the batch.
        opset: version of the ONNX operators, 18 to 23.
        check_inputs: real examples to compare on, like `example_inputs` with any number of examples.
        input_names, output_names: of the file, one for each tensor; by default those of the model's arguments, and
            `output`, or `output_logits`, `output_0`, ... after the place in what it returns.
        metadata: strings for the file's `metadata_props`; `ImageModel.props` makes them for a classifier of images.

    Raises:
        InputError: inputs that are not tensors with one batch size, or a path that cannot be written.
        RangeError: an opset that is not supported.
        ExportError: the model does not run, the exporter cannot follow it, or it works at one batch size only.
        ParityError: the file does not give the model's outputs. It is kept beside as `NAME.failed.onnx`.
    """
    path, model = Path(path), unwrap_compiled(model)
    if opset not in OPSETS:
        raise RangeError("opset", opset, f"{OPSETS[0]} to {OPSETS[-1]}")
    examples = _examples(example_inputs, check_inputs)
    # Compared before it takes its place: whoever finds `path` finds a file that passed.
    with eval_mode(model), atomic_write(path) as unproven:
        _write(model, unproven, example_inputs, opset, _Names(input_names, output_names), metadata or {})
        try:
            parity = compare(model, unproven, examples)
        except UnequalError as unequal:
            kept = path.with_name(f"{path.stem}.failed.onnx")
            unproven.replace(kept)
            raise ParityError(str(unequal), str(kept), _advice(model)) from unequal
    return ExportReport(
        path=path,
        size_bytes=path.stat().st_size,
        opset=opset,
        max_abs_difference=parity.max_abs_difference,
        relative=parity.relative,
        images=parity.images,
        top1_agreement=parity.top1_agreement,
        providers=parity.providers,
    )


def require_exportable(model: nn.Module, example_inputs: Any) -> None:
    """Export a model and throw the file away: what would fail after a training fails before.

    Raises:
        ExportError: it cannot be exported, or the file does not give its outputs.
    """
    with exported_aside(model, example_inputs):
        pass


@contextmanager
def exported_aside(model: nn.Module, example_inputs: Any) -> Iterator[Path]:
    """Export a model into a folder that is thrown away, and prove it.

    Yields:
        The file, there as long as the `with` lasts.

    Raises:
        ExportError: it cannot be exported, or the file does not give its outputs.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "aside.onnx"
        try:
            export_onnx(model, path, example_inputs)
        except ParityError as error:
            why = f"its ONNX file would not give what it gives: {error.reason}"
            raise ExportError(type(model).__name__, why, "let it give the same twice in evaluation mode") from error
        yield path


def _advice(model: nn.Module) -> str:
    """Return what may help, by the model's precision: onnxruntime has few kernels for anything but single."""
    kinds = {str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.is_floating_point()}
    if kinds - {"float32"}:
        return f"The model is in {', '.join(sorted(kinds))}: export_onnx(model.float(), ...) may do"
    return "Another opset may do: export_onnx(..., opset=20)"


def _examples(example_inputs: Any, check_inputs: Any) -> list[Any]:
    """Return the inputs to compare on: random ones, and those of the caller."""
    batch_size(example_inputs)
    if check_inputs is None:
        return [random_like(example_inputs)]
    batch_size(check_inputs, "check_inputs")
    asked = _kinds(example_inputs)
    given = _kinds(check_inputs)
    if asked != given:
        raise InputError(f"check_inputs hold {given}, and example_inputs {asked}: give examples of the same kind")
    return [random_like(example_inputs), check_inputs]


def _kinds(inputs: Any) -> str:
    """Say what inputs look like, whatever their batch size."""
    return ", ".join(
        f"{place} {tensor.dtype} ({', '.join(['B', *map(str, tensor.shape[1:])])})".strip()
        for place, tensor in named_tensors(inputs)
    )


@dataclass(frozen=True)
class _Names:
    """The names of a file's inputs and outputs; None leaves them to the model."""

    inputs: Sequence[str] | None
    outputs: Sequence[str] | None


def _write(
    model: nn.Module, path: Path, example_inputs: Any, opset: int, wanted: _Names, metadata: Mapping[str, str]
) -> None:
    name = type(model).__name__
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    if size > LARGEST_BYTES:
        raise ExportError(name, f"its weights take {size / 1e9:.1f} GB, and an ONNX file holds 2", "make it smaller")
    # The exporter takes a batch of one for a fixed one: two examples, whatever came.
    inputs = tree_map(lambda tensor: tensor[torch.arange(2) % len(tensor)], to_device(example_inputs, device_of(model)))
    try:
        names = returned_names(model, inputs)
    except Exception as failure:
        why = f"it does not run on two of the examples: {first_line(failure)}"
        raise ExportError(name, why, "give what model(example_inputs) takes at any batch size") from failure
    for kind, given, count in (
        ("input", wanted.inputs, len(list(named_tensors(inputs)))),
        ("output", wanted.outputs, len(names)),
    ):
        if given is not None and len(given) != count:
            raise InputError(f"{kind}_names {list(given)}: the model has {count} {kind}s, give one name for each")
    exported = _exported(model, inputs, _Names(wanted.inputs, wanted.outputs or names), opset)
    _refuse_surprises(name, exported, opset)
    replace_batch_norms(exported)
    _forget_sources(exported)
    exported.metadata_props.clear()
    exported.metadata_props.update(metadata)
    _save(exported, path)


def _exported(model: nn.Module, inputs: Any, names: _Names, opset: int) -> Any:
    """Return the model as torch's exporter translates it, an `onnx_ir.Model`."""
    args, kwargs = as_arguments(inputs)
    if args and isinstance(args[-1], dict):
        args = (*args, {})  # the exporter takes a dict at the end for keyword arguments
    batch = torch.export.Dim("batch")
    try:
        # dynamo=True: torch's older exporter traces one run, and sizes that Python computed become constants.
        with _quiet():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=names.inputs,
                output_names=names.outputs,
                dynamic_shapes=tree_map(lambda _: {0: batch}, kwargs or as_arguments(inputs)[0]),
            )
    except Exception as failure:
        reason = f"torch.export does not follow it: {first_line(failure)}"
        raise ExportError(type(model).__name__, reason, "change what it names, or export by hand") from failure
    assert program is not None, "given no path, the exporter returns the program"
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, logs and dumps of graphs to itself; what goes wrong is in its exception."""
    # Its warnings are about its own translation; whether that is right is what the gate finds out.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _refuse_surprises(name: str, exported: Any, opset: int) -> None:
    """Refuse what the exporter goes on with: a fixed batch size, and an opset that it cannot write."""
    # A number where the batch should be a name: some view() or expand() in the model fixed it.
    if any(isinstance(tensor.shape[0], int) for tensor in exported.graph.inputs):
        instead = "write x.flatten(1) or x.view(x.shape[0], ...) for x.view(2, ...)"
        raise ExportError(name, "its code fixes the batch size", instead)
    if (given := exported.opset_imports[""]) != opset:
        raise ExportError(name, f"torch gives opset {given} for it, and {opset} was asked for", f"ask for {given}")


def _forget_sources(exported: Any) -> None:
    """Take away the stack traces: of no use at run time, and they name the folders of this machine."""
    # A file that depends on where it was made could not be compared by its checksum either.
    for node in exported.graph.all_nodes():
        node.metadata_props.clear()


def _save(exported: Any, path: Path) -> None:
    """Write one file; torch's own `save` would begin a second one at 1.5 GB."""
    from onnxscript import ir

    proto = ir.to_proto(exported)
    # What is an initializer has its shape already: tools that rewrite weights (onnxruntime's quantisation transposes
    # them) change it there alone, and find the two at odds.
    stored = {each.name for each in proto.graph.initializer}
    others = [each for each in proto.graph.value_info if each.name not in stored]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(others)
    path.write_bytes(proto.SerializeToString(deterministic=True))
