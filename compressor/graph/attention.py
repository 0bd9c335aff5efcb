"""Multi-head attention that may have fewer heads than its embedding is wide.

`torch.nn.MultiheadAttention` computes the width of a head from the width of its input, so no head can go and no channel
of the input either. The class here does the same sums and reads every width off its weights. Tracing runs attention
this way; a model gets it for good where a cut makes it necessary, with the same parameters under the same names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shape letters: B batch, L targets, S sources, E embedding, H heads, D width of a head.


class HeadwiseAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose number of heads is `len(weights) / head_dim`, whatever the embedding's width."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values and, if asked, the weights; arguments and shapes as in `nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass attn_mask with it")
        batched = query.dim() == 3
        time_first = not self.batch_first
        q, k, v = (_batch_first(x, batched, time_first) for x in self._projected(query, key, value))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        q, k, v = (torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = _mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            # By `head_dim` as it was built: torch divides by the root of embed_dim / num_heads, which a cut changes.
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        result = self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, L, E)
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result.transpose(0, 1) if time_first else result, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values, each `(..., H * D)`."""
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        # One product instead of three, as torch does it, so that rounding is the same too.
        elif query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        else:
            weights = list(self.in_proj_weight.chunk(3))
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Add the learned source, and the source of zeros, where the module has them."""
        if bias is not None:
            x = torch.cat([x, bias.expand(len(x), -1, -1)], 1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x


def _batch_first(x: Tensor, batched: bool, time_first: bool) -> Tensor:
    if not batched:
        return x.unsqueeze(0)
    return x.transpose(0, 1) if time_first else x


def _mask(q: Tensor, k: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Return what is added to the scores `(B, H, L, S)`: 0, or minus infinity where attention is forbidden."""
    total: Tensor | None = None
    if mask is not None:
        mask = _additive(mask, q.dtype)
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        total = mask if mask.dim() == 2 else torch.unflatten(mask, 0, (len(q), -1))
    if padding is not None:
        padding = _additive(padding, q.dtype)
        padding = F.pad(padding, (0, k.shape[2] - padding.shape[-1])).reshape(len(q), 1, 1, -1)
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


@contextlib.contextmanager
def headwise(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run every plain `nn.MultiheadAttention` among the modules as `HeadwiseAttention` inside the `with`."""
    # A subclass has a forward of its own, which may be anything. The class is changed, and not the module replaced, so
    # that parameters, hooks and references to it stay.
    plain = [module for module in modules if type(module) is nn.MultiheadAttention]
    try:
        for module in plain:
            module.__class__ = HeadwiseAttention
        yield
    finally:
        for module in plain:
            module.__class__ = nn.MultiheadAttention


def refit_attention(module: nn.MultiheadAttention) -> dict[str, object]:
    """Return the widths of an attention's weights, by attribute, and change its class if they ask for it."""
    first = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    inner = module.out_proj.weight.shape[1]  # H * D; `head_dim` stays, since heads are cut whole
    widths = {"embed_dim": first.shape[1], "num_heads": inner // module.head_dim}
    if module.in_proj_weight is None:
        widths |= {"kdim": module.k_proj_weight.shape[1], "vdim": module.v_proj_weight.shape[1]}
    else:
        widths |= {"kdim": first.shape[1], "vdim": first.shape[1]}
    if inner == first.shape[1] == len(module.out_proj.weight) or type(module) is not nn.MultiheadAttention:
        return widths
    module.__class__ = HeadwiseAttention
    # NOTE: False also keeps nn.TransformerEncoderLayer from its fused kernel, which reads widths off the input.
    return widths | {"_qkv_same_embed_dim": False}
