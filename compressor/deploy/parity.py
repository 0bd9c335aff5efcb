"""The parity gate: does an ONNX file give what the PyTorch model gives?

Both run the same examples in batches of 1 and of 7. Every output must agree within a share of its scale, 1e-4 in single
precision, and the top-1 class must be the same wherever the model's own choice is clearer than that.

A worked example: the scores `[8.0, 7.9995, -2.0]` have the scale 8, so that 0.0008 is allowed. `[7.9995, 8.0, -2.0]`
passes, though its top-1 class is another: the model's own margin, 0.0005, is within what is allowed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compressor._utils import as_arguments, batch_size, device_of, named_tensors, tf32_disabled, to_device
from compressor.deploy.openvino_engine import has_openvino, open_openvino
from compressor.deploy.session import open_session
from compressor.errors import ArtifactError, InputError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the largest absolute value of an output, in single precision
BATCH_SIZES = (1, 7)  # one that exporters like to fix, and one that no kernel is made for
RANDOM_EXAMPLES = 7

Run = Callable[[Any], list[Tensor]]


class UnequalError(Exception):
    """Says what differs; `export` turns it into a `ParityError`, which knows where the file went."""


@dataclass
class Parity:
    """What a comparison saw.

    Attributes:
        max_abs_difference: largest difference, over all outputs and examples.
        relative: largest difference as a share of its output's scale.
        images: how many examples were compared.
        providers: where they ran: onnxruntime's providers, OpenVINO.
        same_class: `(B,)` for each comparison of class scores, whether the top-1 class was the same.
    """

    max_abs_difference: float = 0.0
    relative: float = 0.0
    images: int = 0
    providers: tuple[str, ...] = ()
    same_class: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def top1_agreement(self) -> float:
        """Share of the examples with the same top-1 class; NaN where there are no class scores."""
        return float(torch.cat(self.same_class).double().mean()) if self.same_class else math.nan


def compare(model: nn.Module, path: Path, examples: list[Any]) -> Parity:
    """Hold an ONNX file against a model in evaluation mode: in onnxruntime, on the CPU and on a usable GPU, and in
    OpenVINO where that is installed.

    Args:
        model: the model.
        path: the ONNX file.
        examples: inputs of any number of examples each.

    Raises:
        UnequalError: the file does not load, does not run, or gives something else.
    """
    parity = Parity(images=sum(batch_size(inputs) for inputs in examples))
    runs = {session.get_providers()[0]: _onnx_run(session) for session in _sessions(path)}
    runs |= _openvino_run(path)
    names = returned_names(model, examples[0])
    for size in BATCH_SIZES:
        # PyTorch once for each size, and every provider against it.
        with tf32_disabled():
            expected = _answers(_torch_run(model), examples, size)
        for provider, run in runs.items():
            where = f"at batch size {size} on {provider}"
            try:
                got = _answers(run, examples, size)
            except Exception as refusal:
                raise UnequalError(f"it does not run {where}: {first_line(refusal)}") from refusal
            judge(parity, names, expected, got, where, tolerance_of(model))
    parity.providers = tuple(runs)
    return parity


def tolerance_of(model: nn.Module) -> float:
    """Return the share of an output's scale that may differ: 1e-4, in half precision eight units in the last place."""
    kinds = {tensor.dtype for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()}
    return max([TOLERANCE, *(8 * torch.finfo(kind).eps for kind in kinds)])


def first_line(failure: BaseException) -> str:
    """Return the type and the first line of the error that began a chain of errors."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"


def returned_names(model: nn.Module, inputs: Any) -> list[str]:
    """Name the outputs after their place in what the model returns: `output`, or `output_logits`, `output_0`, ..."""
    args, kwargs = as_arguments(to_device(inputs, device_of(model)))
    return [f"output_{place}".strip("_") for place, _ in named_tensors(model(*args, **kwargs))]


def random_like(example_inputs: Any) -> Any:
    """Return seven random examples: normal numbers; whole numbers are drawn from those that the example holds."""
    generator = torch.Generator().manual_seed(0)

    # Whole numbers are indices as a rule, of words say: one that was never seen could be out of range.
    def draw(tensor: Tensor) -> Tensor:
        shape = (RANDOM_EXAMPLES, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator).to(tensor.dtype)
        values = tensor.detach().cpu().flatten()
        return values[torch.randint(len(values), shape, generator=generator)]

    return tree_map(draw, example_inputs)


# -- running


def _sessions(path: Path) -> Iterator[Any]:
    """Open the file on the CPU, and on a GPU where onnxruntime can use one; `Parity.providers` says where."""
    try:
        yield open_session(path, "cpu", threads=torch.get_num_threads())
        if torch.cuda.is_available():
            yield open_session(path, "cuda", tf32=False)
        else:
            logger.info("no GPU here: %s is compared on the CPU only", path.name)
    except InputError as unusable:  # a GPU that PyTorch uses and onnxruntime does not: the CPU has been opened
        logger.warning("%s is compared on the CPU only: %s", path.name, unusable)
    except Exception as refusal:
        raise UnequalError(f"onnxruntime does not load it: {first_line(refusal)}") from refusal


def _torch_run(model: nn.Module) -> Run:
    device = device_of(model)

    def run(inputs: Any) -> list[Tensor]:
        args, kwargs = as_arguments(to_device(inputs, device))
        return [tensor.detach().cpu() for _, tensor in named_tensors(model(*args, **kwargs))]

    return run


def _onnx_run(session: Any) -> Run:
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        arrays = [tensor.cpu().numpy() for _, tensor in named_tensors(inputs)]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def _openvino_run(path: Path) -> dict[str, Run]:
    """Return how to run the file in OpenVINO, by that name; nothing where it is not installed, or lacks an operator."""
    if not has_openvino():
        return {}
    try:
        compiled = open_openvino(path, torch.get_num_threads())
    except ArtifactError as refusal:
        logger.warning("%s is not compared in OpenVINO: %s", path.name, str(refusal).partition("\n")[0])
        return {}

    def run(inputs: Any) -> list[Tensor]:
        results = compiled([tensor.cpu().numpy() for _, tensor in named_tensors(inputs)])
        return [torch.from_numpy(results[slot].copy()) for slot in compiled.outputs]

    return {"OpenVINO": run}


def _answers(run: Run, examples: list[Any], size: int) -> list[Tensor]:
    """Run all examples in batches of `size`; every output joined along its first dimension."""
    batches = [run(batch) for inputs in examples for batch in _batches(inputs, size)]
    joined = zip(*batches, strict=True)
    # A lone number, a loss say, has no dimension to be joined along.
    return [torch.cat([piece.reshape(piece.shape or (1,)) for piece in pieces]) for pieces in joined]


def _batches(inputs: Any, size: int) -> Iterator[Any]:
    for start in range(0, batch_size(inputs), size):
        yield tree_map(lambda tensor, rows=slice(start, start + size): tensor[rows], inputs)


# -- judging


def judge(
    parity: Parity,
    names: list[str],
    expected: list[Tensor],
    got: list[Tensor],
    where: str,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare all outputs of one run; writes the largest difference into `parity`.

    Raises:
        UnequalError: the outputs are others, or differ by more than is allowed; or the model's own are no numbers.
    """
    if len(got) != len(expected):
        raise UnequalError(f"it gives {len(got)} outputs {where}, and the model {len(expected)}")
    for name, ours, theirs in zip(names, expected, got, strict=True):
        if ours.shape != theirs.shape:
            raise UnequalError(f"{name!r} has shape {tuple(theirs.shape)} {where}, and the model's {tuple(ours.shape)}")
        allowed = _judge_values(parity, name, ours, theirs, where, tolerance)
        # Classifiers return their scores first; what else they return is no choice between classes.
        if name == names[0] and ours.dim() == 2 and ours.shape[1] > 1:
            _judge_classes(parity, name, ours, theirs, allowed, where)


def _judge_values(parity: Parity, name: str, ours: Tensor, theirs: Tensor, where: str, tolerance: float) -> float:
    """Compare the values of one output; return the difference that is allowed: none between whole numbers."""
    tolerance = tolerance if ours.is_floating_point() else 0.0
    ours = ours.double()
    theirs = theirs.double()
    if ours.isnan().any():
        raise UnequalError(f"{name!r} of the model itself is NaN {where}, so that nothing can be proven")
    same = ours == theirs  # infinities too: they are equal answers, and have no difference
    difference = float(torch.where(same, 0.0, (ours - theirs).abs()).max()) if ours.numel() else 0.0
    scale = float(ours[ours.isfinite()].abs().max()) if ours.isfinite().any() else 0.0
    if not difference <= tolerance * scale:  # so that NaN is refused as well
        raise UnequalError(
            f"{name!r} differs by {difference:.3g} {where}, and {tolerance * scale:.3g} is allowed "
            f"({tolerance:g} of its scale {scale:.3g})"
        )
    parity.max_abs_difference = max(parity.max_abs_difference, difference)
    parity.relative = max(parity.relative, difference / scale if difference else 0.0)
    return tolerance * scale


def _judge_classes(parity: Parity, name: str, ours: Tensor, theirs: Tensor, allowed: float, where: str) -> None:
    """Compare the top-1 class of every example; it must be the same where the model's own margin is clear."""
    same = ours.argmax(1) == theirs.argmax(1)
    first, second = ours.double().topk(2).values.unbind(1)
    if wrong := int((~same & (first - second > allowed)).sum()):
        raise UnequalError(f"{name!r} has another top-1 class for {wrong} of {len(ours)} examples {where}")
    parity.same_class.append(same)
