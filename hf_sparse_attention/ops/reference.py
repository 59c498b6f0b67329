"""Dense alpha-entmax attention: the specification that every other backend is compared to.

Built on the ``entmax`` package (Peters et al., arXiv 1905.05702). It holds the (B, Hq, Lq, Lk) weights, so it is for
tests, short inputs and returned weights.
"""

from __future__ import annotations

from typing import Any

import torch
from entmax import entmax15, entmax_bisect, sparsemax
from torch import Tensor

from .visibility import Visibility, alibi_positions

# Below this the bisection loses more digits than softmax differs from entmax.
_SOFTMAX_LIMIT = 1e-9
# Halvings of an interval of length at most 1: enough for the 53 bits of float64.
_BISECTIONS = 60


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float,
    scaling: float,
    query_scale: Tensor | None = None,
    slopes: Tensor | None = None,
    visibility: Visibility = Visibility(None, None, None),  # noqa: B008 (immutable)
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    top_k: int | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention with all weights in memory; differentiable by autograd.

    Computes in the dtype of the inputs, half precisions in float32. Arguments are those of
    :func:`~hf_sparse_attention.ops.sparse_attention`, already validated.

    Returns:
        The output (B, Hq, Lq, Dv) and the weights after dropout (B, Hq, Lq, Lk), both in the dtype of ``query``.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, query_heads, query_length, head_dim = query.shape
    key_heads, key_length = key.shape[1], key.shape[2]

    queries = query.to(dtype) * scaling
    if query_scale is not None:
        queries = queries * query_scale.to(dtype)[..., None]
    queries = queries.view(batch, key_heads, query_heads // key_heads, query_length, head_dim)
    scores = (queries @ key.to(dtype)[:, :, None].mT).view(batch, query_heads, query_length, key_length)
    if slopes is not None:
        query_at, key_at = alibi_positions(query_length, key_length, query_positions, key_positions, query.device)
        distance = (query_at[:, :, None] - key_at[:, None, :]).abs().to(dtype)  # [B or 1, Lq, Lk]
        scores = scores - slopes.to(dtype)[:, None, None] * distance[:, None]

    weights = entmax_weights(scores, alpha, visibility.dense(query, key), top_k)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    grouped = weights.view(batch, key_heads, query_heads // key_heads, query_length, key_length)
    output = (grouped @ value.to(dtype)[:, :, None]).view(batch, query_heads, query_length, value.shape[3])
    return output.to(query.dtype), weights.to(query.dtype)


def entmax_weights(scores: Tensor, alpha: float, visible: Tensor | None = None, top_k: int | None = None) -> Tensor:
    """alpha-entmax of the last dimension of ``scores`` over its visible entries; rows without any give zeros.

    Args:
        scores: (..., n), float32 or float64.
        alpha: in [1, 2]; 1 is softmax, 2 sparsemax.
        visible: bool, broadcastable to the shape of ``scores``.
        top_k: softmax over the largest ``top_k`` visible scores; scores tied with the last of them are kept too.
    """
    if scores.shape[-1] == 0:
        return scores
    if visible is not None:
        # A row of -inf would become NaN, also in its gradient: it is computed as if visible, then zeroed.
        hidden = ~visible & visible.any(-1, keepdim=True)
        scores = scores.masked_fill(hidden, -torch.inf)
    if top_k is not None and top_k < scores.shape[-1]:
        smallest_kept = scores.detach().topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < smallest_kept, -torch.inf)

    weights = scores.softmax(-1) if alpha - 1.0 < _SOFTMAX_LIMIT else _entmax(scores, alpha)
    return weights if visible is None else weights.masked_fill(~visible, 0.0)


def _entmax(scores: Tensor, alpha: float) -> Tensor:
    """alpha-entmax for alpha > 1, in float64: sums over sorted rows and powers of 1 / (alpha - 1) lose digits."""
    shifted = (scores - scores.detach().amax(-1, keepdim=True)).to(torch.float64)
    # Sorting solvers index out of bounds in a row with NaN; it is NaN throughout, as under softmax.
    broken = shifted.isnan().any(-1, keepdim=True)
    shifted = shifted.masked_fill(broken, 0.0)
    weights = _Entmax.apply(shifted, alpha, scores.dtype == torch.float64)
    return weights.masked_fill(broken, torch.nan).to(scores.dtype)


class _Entmax(torch.autograd.Function):
    """The solvers of ``entmax`` with a backward (arXiv 1905.05702, proposition 2) of which autograd takes gradients.

    The package's own gives NaN in second derivatives, and cannot be traced by compilers nor used by ``torch.func``.
    """

    @staticmethod
    def forward(scores: Tensor, alpha: float, exact: bool) -> Tensor:
        if alpha == 2.0:
            return sparsemax(scores, dim=-1)
        if alpha == 1.5 and not exact:
            # Accurate to 1e-8 only when many scores are tied at the edge of the support.
            return entmax15(scores, dim=-1)
        return entmax_bisect(scores, alpha, dim=-1, n_iter=_BISECTIONS)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.alpha = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        support = weights > 0.0
        # Powers of 0 would have infinite derivatives.
        slope = torch.where(support, torch.where(support, weights, 1.0) ** (2.0 - ctx.alpha), 0.0)
        product = slope * grad
        return product - slope * (product.sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, scores: Tensor, alpha: float, exact: bool) -> tuple[Tensor, int]:
        return _Entmax.apply(scores.movedim(in_dims[0], 0), alpha, exact), 0
