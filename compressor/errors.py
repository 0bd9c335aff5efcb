"""Every exception that compressor raises on purpose.

    CompressorError
    ├── InputError                  something that was typed or passed cannot be used
    │   ├── UnknownNameError        a model, criterion, data set, ... that does not exist; says what is close
    │   ├── RangeError              a number outside its range
    │   ├── ScoreError              a criterion cannot judge a group, or gave scores that cannot be ranked
    │   ├── IdleArgumentError       an argument that would have no effect
    │   ├── OptimizerError          the optimizer does not hold the model's parameters
    │   ├── PeriodError             too few training steps to tell any channel from chance
    │   └── RunFolderError          the run folder is already there, or is not one
    ├── DataError                   a data folder is missing, empty or broken
    ├── TraceError                  the model did not run on the example inputs
    ├── CutError                    a cut was refused; model and optimizer are as they were
    │   └── StaleGraphError         the model does not run any more as it did when it was traced
    ├── BudgetError                 the asked sparsity cannot be reached; names what blocks it
    ├── TrainingError               the loss became infinite or not a number
    ├── RanksError                  the processes of one training lost each other
    ├── ArtifactError               a model file is damaged, foreign, or of another model
    ├── ExportError                 the model cannot be written as ONNX
    └── ParityError                 the exported model does not give the same outputs

Every message says what came, why we cannot go on, and what to type instead. A message with a form of its own lives in
its class: the caller passes the facts, which stay readable as attributes, and no prose; `InputError`, `DataError`,
`ArtifactError` and `RunFolderError` take the one sentence of the one place that raises it. The command line prints the
message without a traceback and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_FEW = 8  # indices that a message lists


class CompressorError(Exception):
    """Base of every exception in this module."""


class InputError(CompressorError, ValueError):
    """Something that was typed or passed cannot be used; the message says what to pass instead."""


class UnknownNameError(InputError):
    """A name that is not in the table it was looked up in.

    Attributes:
        kind, name: what was looked up ("criterion", "group", ...), and by which name.
        known: all names that there are.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        self.kind = kind
        self.name = name
        self.known = tuple(known)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        listed = ", ".join(known) if len(known) <= 20 else ", ".join(known[:20]) + ", ..."
        advice = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {listed or 'none'}"
        super().__init__(f"unknown {kind} {name!r}: {advice}{'; ' + hint if hint else ''}")


class RangeError(InputError):
    """A number outside the range in which it means something.

    Attributes:
        name, value: of the number.
        allowed: its range, in words.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name = name
        self.value = value
        self.allowed = allowed
        super().__init__(f"{name} = {value} is out of range: give {name} in {allowed}")


class ScoreError(InputError):
    """A group without scores that can be ranked. Raised by a criterion, it means: leave this group whole.

    Attributes:
        group: its name.
        reason: why it cannot be judged.
    """

    def __init__(self, group: str, reason: str, instead: str) -> None:
        self.group = group
        self.reason = reason
        super().__init__(f"no usable scores for group {group!r}: {reason}; {instead}")


class RunFolderError(InputError):
    """The run folder cannot be used as it is."""


class IdleArgumentError(InputError):
    """An argument that would have no effect.

    Attributes:
        name: of the argument.
        beside: what makes it idle.
    """

    def __init__(self, name: str, beside: str) -> None:
        self.name = name
        self.beside = beside
        super().__init__(f"{name} has no effect with {beside}: leave one of them out")


class OptimizerError(InputError):
    """The optimizers do not hold the parameters that they should train.

    Attributes:
        missing: names of parameters that none of them holds.
        any_would_do: whether one held parameter would have been enough.
    """

    def __init__(self, missing: Sequence[str], any_would_do: bool) -> None:
        self.missing = tuple(missing)
        self.any_would_do = any_would_do
        none = f"holds none of the model's {len(missing)} parameters ({missing[0]!r}, ...)"
        what = none if any_would_do else f"does not hold {missing[0]!r}"
        super().__init__(
            f"the optimizer {what}: its state would not be cut or masked along; make it from model.parameters() of the "
            "very model that is given here, or freeze what it shall not train (requires_grad = False)"
        )


class PeriodError(InputError):
    """Too few steps to tell any channel from chance.

    Attributes:
        steps: how many there are.
        needed: how many it takes.
    """

    def __init__(self, what: str, steps: int, needed: int, batch_size: int, instead: str) -> None:
        self.steps = steps
        self.needed = needed
        super().__init__(
            f"{what} = {steps} step{'s' * (steps != 1)} cannot resolve anything: with batches of {batch_size} it takes "
            f"{needed} to tell from chance even a channel that saves a whole standard deviation of the loss; {instead}"
        )


class DataError(CompressorError):
    """A data folder is missing, empty or holds something that cannot be read."""


class TraceError(CompressorError):
    """The model did not run on the example inputs; the model's own error is the cause.

    Attributes:
        model: name of its class.
        shapes: of the example inputs.
        where: qualified name of the module that failed; empty for the model's own code.
    """

    def __init__(self, model: str, shapes: str, where: str, cause: BaseException) -> None:
        self.model = model
        self.shapes = shapes
        self.where = where
        at = f" at module {where!r}" if where else ""
        super().__init__(
            f"{model} does not run on the example inputs {shapes}{at}: {type(cause).__name__}: {cause}; "
            "pass example_inputs that model(example_inputs) accepts"
        )


class CutError(CompressorError):
    """A cut was refused. The model and the optimizer are bit for bit as they were.

    Attributes:
        groups: names of the groups that cannot be cut as asked, so that a caller can go on without them.
        reason: why, in words; the reason that those groups get when they are frozen.
    """

    def __init__(self, reason: str, groups: Sequence[str] = ()) -> None:
        self.reason = reason
        self.groups = tuple(groups)
        names = f" (group {', '.join(self.groups)})" if groups else ""
        super().__init__(f"cut refused{names}: {reason}; nothing was changed")


class StaleGraphError(CutError):
    """Even uncut, the model does not run the operations of its trace any more, and cannot be traced anew."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}. The same shows without any cut: the model keeps something of an earlier run, or was changed; "
            "graph = compressor.trace(model, example_inputs) once more"
        )


class BudgetError(CompressorError):
    """The asked sparsity cannot be reached.

    Attributes:
        measure, asked: what was to go.
        best: the share that can.
        blocked: lines that say what stands in the way.
    """

    def __init__(self, measure: str, asked: float, best: float, blocked: Sequence[str]) -> None:
        self.measure = measure
        self.asked = asked
        self.best = best
        self.blocked = tuple(blocked)
        why = "".join(f"\n  - {line}" for line in blocked)
        reachable = int(best * 1000) / 1000
        less = f"at most {best:.1%} can go; ask for a sparsity of {reachable:g} or less"
        advice = less if reachable else "nothing can go"
        super().__init__(
            f"cannot remove {asked:.1%} of the {measure}: {advice}. What blocks it:{why or ' nothing is left to cut'}"
        )


class TrainingError(CompressorError):
    """The loss became infinite or not a number: training diverged.

    Attributes:
        loss: the mean loss of the step, or of the epoch where nobody looked before its end.
        epoch: which one, from 1.
        lr: the highest learning rate.
        step: which one, from 1; None where only the epoch is known.
        images: indices of that step's images in their data set.
    """

    def __init__(self, loss: float, epoch: int, lr: float, step: int | None = None, images: Sequence[int] = ()) -> None:
        self.loss = loss
        self.epoch = epoch
        self.lr = lr
        self.step = step
        self.images = tuple(images)
        when = f"epoch {epoch}" if step is None else f"step {step}, epoch {epoch}"
        few = ", ".join(map(str, self.images[:_FEW])) + (", ..." if len(self.images) > _FEW else "")
        batch = f"; images of that step, by their index in the training data: {few}" if self.images else ""
        super().__init__(
            f"the loss became {loss} in {when}: training diverged at lr = {lr:g}; try {lr / 3:.1g} or less{batch}"
        )


class RanksError(CompressorError):
    """The processes that train together lost each other: one of them has ended.

    Attributes:
        reason: what the connection says.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"another process of this training has ended ({reason}): what it said itself is why; the last checkpoint "
            "stays, --resume goes on from it, with any number of processes"
        )


class ArtifactError(CompressorError):
    """A model file is damaged, foreign, or belongs to another model."""


class ExportError(CompressorError):
    """The model cannot be written as an ONNX file; nothing was written.

    Attributes:
        model: name of its class.
        reason: why not.
    """

    def __init__(self, model: str, reason: str, instead: str) -> None:
        self.model = model
        self.reason = reason
        super().__init__(f"{model} cannot be exported to ONNX: {reason}; {instead}")


class ParityError(CompressorError):
    """The exported ONNX file does not give the model's outputs.

    Attributes:
        reason: which output differs by how much, at which batch size.
        kept: where the file lies that failed, for inspection.
    """

    def __init__(self, reason: str, kept: str, advice: str) -> None:
        self.reason = reason
        self.kept = kept
        super().__init__(
            f"the ONNX file is not the model: {reason}; it is kept as {kept}, other files are as they were. {advice}"
        )


def no_axis_rule(op: str, module: str, shape: Sequence[int]) -> str:
    """Return the message about an operation that the channel graph has no rule for, at the module where it ran."""
    return (
        f"no axis rule for op {op!r} {_at_module(module)} (input shape {tuple(shape)}); channels that reach it stay.\n"
        f'Teach it:        compressor.RULES["{op}"] = my_rule     (docs/adding_an_op.md)\n'
        "or accept it:    trace(model, example_inputs)               keeps those channels frozen"
    )


def failed_axis_rule(op: str, module: str, shape: Sequence[int], problem: str) -> str:
    """Return the message about an operation whose rule raised, or returned axes that its results do not have."""
    return (
        f"the axis rule for op {op!r} {_at_module(module)} (input shape {tuple(shape)}) failed: {problem}; channels "
        "that reach it stay.\n"
        f'Mend it:         compressor.RULES["{op}"]               (docs/adding_an_op.md)'
    )


def _at_module(module: str) -> str:
    return f"at module {module!r}" if module else "in the model's own code"
