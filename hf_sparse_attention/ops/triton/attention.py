"""Public entry of the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .operator import EagerAttention, decode, decode_op, forward, forward_op
from .tiling import INTERPRETED

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 256
# Up to so many queries, and queries times heads per key head, go to the decoding kernels.
_DECODE_QUERIES, _DECODE_ROWS = 16, 128
# Below this, float32 powers of 1 / (alpha - 1) lose more than bfloat16 resolves.
_MIN_ALPHA = 1.001


def unsupported_reason(query: Tensor, key: Tensor, value: Tensor, alpha: float) -> str | None:
    """Why these inputs cannot go to the kernels, as the end of a sentence, or None if they can."""
    if not (query.is_cuda or INTERPRETED):
        return f"they need a CUDA device, and query is on {query.device}"
    if query.dtype not in _DTYPES:
        return f"they take float16, bfloat16 and float32, and query is {query.dtype}"
    if INTERPRETED and query.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16"
    if not query.dtype == key.dtype == value.dtype:
        return f"they need one dtype, and query, key, value are {query.dtype}, {key.dtype}, {value.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_DIM:
        return f"they take head dimensions up to {_MAX_HEAD_DIM}, got {query.shape[-1]} and {value.shape[-1]}"
    if 1.0 < alpha < _MIN_ALPHA:
        return f"they take alpha = 1 and alpha of at least {_MIN_ALPHA}, got {alpha}"
    return None


def _is_eager(query: Tensor) -> bool:
    """Whether nobody traces, wraps or watches operators: then the functions behind them can be called themselves."""
    return type(query) is Tensor and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float,
    scaling: float,
    query_scale: Tensor | None,
    slopes: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    query_positions: Tensor | None,
) -> Tensor:
    """alpha-entmax attention over one half-open key range per query, without storing scores.

    Args:
        query: (B, Hq, Lq, D) float16, bfloat16 or float32, any strides.
        key: (B, Hk, Lk, D) with Hq % Hk == 0.
        value: (B, Hk, Lk, Dv).
        alpha: 1 (softmax), or from 1.001 to 2; 1.5 and 2 have their own code.
        scaling: factor of every score.
        query_scale: (B, Hq, Lq) factor of the scores of each query.
        slopes: (Hq,) ALiBi: ``slope * |query_position - key index|`` is subtracted from a score.
        key_start, key_end: int32 (B or 1, Lq), visible keys of each query; an empty range gives zeros.
        query_positions: int (B or 1, Lq) for the ALiBi distance; default ``i + Lk - Lq``.

    Returns:
        (B, Hq, Lq, Dv) in the dtype of ``query``, differentiable in query, key, value, query_scale and slopes; the
        backward is deterministic.
    """
    head_dim, value_dim = query.shape[3], value.shape[3]
    if head_dim % 8:
        query, key = pad(query, (0, -head_dim % 8)), pad(key, (0, -head_dim % 8))
    if value_dim % 8:
        value = pad(value, (0, -value_dim % 8))
    inputs = [query, key, value, *(t for t in (query_scale, slopes) if t is not None)]
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if key_start.shape != key_end.shape:
        # The kernels read both ranges with one stride.
        key_start, key_end = torch.broadcast_tensors(key_start, key_end)
    key_start, key_end = (t.to(torch.int32).contiguous() for t in (key_start, key_end))
    if query_positions is not None:
        query_positions = query_positions.to(torch.int32).contiguous()
    query_scale, slopes = (None if t is None else t.contiguous() for t in (query_scale, slopes))
    arguments = (
        query,
        key,
        value,
        query_scale,
        slopes,
        key_start,
        key_end,
        query_positions,
        float(alpha),
        float(scaling),
    )
    group_rows = query.shape[1] // key.shape[1] * query.shape[2]
    eager = _is_eager(query)
    if not training and query.shape[2] <= _DECODE_QUERIES and group_rows <= _DECODE_ROWS:
        out = decode(*arguments) if eager else decode_op(*arguments)
    elif training:
        out = EagerAttention.apply(*arguments, True) if eager else forward_op(*arguments, True)[0]
    else:
        out = (forward if eager else forward_op)(*arguments, False)[0]
    return out[..., :value_dim] if value_dim % 8 else out
