"""The arithmetic of gates, made cheap.

A gated input costs little to compute and much to allocate: on a CPU, fresh memory for a large tensor takes longer than
filling it. And if a layer keeps its gated input for the backward pass, beside the ungated one that the ReLU before it
keeps, a ResNet needs half as much memory again. So

* what a layer would save of its gated input is made again, when its backward pass asks for it;
* on a CPU, gated inputs all live in one workspace, one after the other, and gradients are gated in place, wherever
  nobody else can see them: at the input of a plain layer on which no one else listens.

Shape letters: B samples; D positions along the channel dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CACHED = 2**17  # numbers of which a product is made at once, on a CPU: half a mebibyte
PLAIN = frozenset((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))  # they use their input once, and keep nothing of it


def may_reuse_memory(module: nn.Module) -> bool:
    """Return whether only a plain layer sees its input and the gradient by it, so that memory can be used again."""
    # NOTE: One hook of each kind is ours. Subclasses may do with their input what they like.
    foreign = len(module._forward_pre_hooks) > 1 or len(module._forward_hooks) > 1
    backward = module._backward_hooks or module._backward_pre_hooks
    return type(module) in PLAIN and not foreign and not backward and not torch.compiler.is_compiling()


def in_checkpoint() -> bool:
    """Return whether what runs now will run again in the backward pass, under `torch.utils.checkpoint`."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    is_reentrant = not torch.is_grad_enabled()  # of that kind the first pass records nothing
    return is_reentrant or any(getattr(hook, "__module__", "") == "torch.utils.checkpoint" for hook in hooks or ())


def in_backward() -> bool:
    """Return whether autograd runs now: what is called then is run again."""
    return torch._C._current_graph_task_id() != -1


class Workspace:
    """Memory that gated inputs share, one after the other: what is there is overwritten by the next."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, torch.UntypedStorage] = {}

    def like(self, h: Tensor) -> Tensor:
        """Return a tensor of that shape, layout and type."""
        needed = h.numel() * h.element_size()
        if h.dtype not in self._memory or self._memory[h.dtype].nbytes() < needed:
            self._memory[h.dtype] = torch.empty(needed, dtype=torch.uint8).untyped_storage()
        # NOTE: set_ makes a tensor that is no view, with a version of its own.
        with torch.no_grad():
            return torch.empty(0, dtype=h.dtype).set_(self._memory[h.dtype], 0, h.shape, h.stride())


@dataclass(frozen=True, eq=False)
class Gate:
    """The gates of one input.

    Attributes:
        rows: `(B, D)`, may require gradients.
        mean: `(D,)`, towards which is gated; 0 if there is none.
        dim: the channel dimension of the input, negative.
        workspace: where gated inputs lie, if they may.
        reuse_memory: whether nobody but the layer sees the gated input, so that it may.
        unexplained: returns, in the shape of the input, the part of it that a gate takes away; all above the mean if
            there is none.
    """

    rows: Tensor
    mean: Tensor | None
    dim: int
    workspace: Workspace
    reuse_memory: bool
    unexplained: Callable[[Tensor], Tensor] | None = None

    def on_recomputed(self, h: Tensor) -> Tensor:
        """Return the gated input by plain operations, and leave memory to torch."""
        gate = self.rows.to(h.dtype).view(_shape_along(self.rows, h, self.dim))
        if self.unexplained:
            return h - (1 - gate) * self.unexplained(h)
        centre = 0.0 if self.mean is None else _along(self.mean, h, self.dim)
        return centre + gate * (h - centre)

    @contextmanager
    def on(self, h: Tensor) -> Iterator[Tensor]:
        """Yield the gated input, which autograd nodes that are made meanwhile do not save: they make it again."""
        if self.unexplained:
            yield self.on_recomputed(h)
            return
        gated: Tensor = _Gated.apply(h, self.rows, self)
        if torch.compiler.is_compiling():
            yield gated
            return
        with torch.autograd.graph.saved_tensors_hooks(*self._saving(gated, h.detach())):
            yield gated

    def _saving(self, gated: Tensor, h: Tensor) -> tuple[Any, Any]:
        """Return what packs and unpacks the tensors that the gated layer saves."""
        layout = (gated.shape, gated.stride())
        version = gated._version
        unchanged = h._version
        address = gated.data_ptr()
        memory = gated.untyped_storage().data_ptr()
        shared = self._in_workspace(h)

        def pack(saved: Tensor) -> Tensor | None:
            if saved.data_ptr() == address and (saved.shape, saved.stride(), saved._version) == (*layout, version):
                return None
            # A view of the workspace, a transposed one say, would hold the next layer's input by the backward pass.
            return saved.clone() if shared and saved.untyped_storage().data_ptr() == memory else saved

        def unpack(saved: Tensor | None) -> Tensor:
            if saved is not None:
                return saved
            # NOTE: Autograd watches what it saved, and it saved nothing: an in-place operation on h would go unnoticed.
            if h._version != unchanged:
                raise RuntimeError("the input of a gated module was modified in place before its backward pass")
            with torch.no_grad():
                return self.applied(h)

        return pack, unpack

    def _in_workspace(self, h: Tensor) -> bool:
        # On a GPU the caching allocator hands out memory at once, and streams may still read what is overwritten.
        dense = h.is_contiguous() or (h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last))
        return self.reuse_memory and dense and h.device.type == "cpu"

    def applied(self, h: Tensor) -> Tensor:
        """Return `gate * h`, or `mean + gate * (h - mean)`."""
        gate = _along(self.rows, h, self.dim)
        out = self.workspace.like(h) if self._in_workspace(h) else None
        if self.mean is None:
            return torch.mul(h, gate, out=out)
        # NOTE: lerp with out= takes no centre of another shape.
        return torch.lerp(_along(self.mean, h, self.dim).expand_as(h), h, gate.expand_as(h), out=out)

    def by_input(self, gradient: Tensor) -> Tensor:
        """Return the gradient by `h`; writes `gradient` where nobody else sees it."""
        gate = _along(self.rows, gradient, self.dim)
        return gradient.mul_(gate) if self._in_workspace(gradient) else gradient * gate

    def by_gate(self, h: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient by every gate, `(B, D)`: the sum over space of `gradient * (h - mean)`."""
        # On a CPU a few samples at a time, so that the product stays in the cache.
        at_once = max(1, CACHED // max(1, h[0].numel())) if h.device.type == "cpu" else len(h)
        centre = None if self.mean is None else _along(self.mean, h, self.dim)
        parts = []
        for part, by_part in zip(torch.split(h, at_once), torch.split(gradient, at_once), strict=True):
            centred = part if centre is None else part - centre
            parts.append(_summed(centred * by_part, self.dim, self.rows.dtype))
        return torch.cat(parts)


class _Gated(torch.autograd.Function):
    """Gates an input, and returns the gradient by every gate in the same backward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, rows: Tensor, gate: Gate) -> Tensor:
        # The ungated input costs no memory: the layer before it, a ReLU say, keeps the same tensor anyway.
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None)
        ctx.gate = gate
        return gate.applied(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (h,) = ctx.saved_tensors
        by_gate = None if h is None else ctx.gate.by_gate(h, gradient)
        return ctx.gate.by_input(gradient) if ctx.needs_input_grad[0] else None, by_gate, None


def _along(values: Tensor, h: Tensor, dim: int) -> Tensor:
    """View values `(B, D)` or `(D,)` so that they broadcast against `h`, in its precision."""
    return values.detach().to(h.dtype).view(_shape_along(values, h, dim))


def _shape_along(values: Tensor, h: Tensor, dim: int) -> list[int]:
    shape = [1] * h.dim()
    shape[0] = len(values) if values.dim() == 2 else 1
    shape[dim] = values.shape[-1]
    return shape


def _summed(product: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sum over everything but samples and channels: `(B, D)`."""
    others = [each for each in range(1, product.dim()) if each != product.dim() + dim]
    return product.sum(others, dtype=dtype) if others else product.to(dtype)
