"""The kernels as two ``torch.library`` operators, one the gradient of the other, opaque to compilers and exporters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backward import key_value_gradient_kernel, query_gradient_kernel, transpose_list_kernel
from .decode import (
    decode_combine_kernel,
    decode_output_kernel,
    decode_scores_kernel,
    decode_threshold_kernel,
)
from .geometry import Geometry, aligned, ceil_div, list_dtype, near, row_stride, strides_of, tokens_first
from .output import output_kernel
from .short import short_kernel
from .softmax import softmax_forward_kernel
from .solve import solve_kernel
from .sweep import CHUNK, ROW_GROUP, key_norms_kernel, sweep_kernel
from .threshold import ENTMAX, ENTMAX15, SOFTMAX, SPARSEMAX
from .tiling import DECODE_SCORES, decode_launch, padded, tiling

LOG2_E = 1.4426950408889634
# Every so many tiles are swept before the others, so that the bounds become good early.
_SAMPLE = 16
# Programs among which the keys of a decoding step are split.
_DECODE_PROGRAMS = 1024
# |F^(1/beta) - 1| before the last step of the threshold, by input dtype; the step leaves far less.
_TOLERANCE = {torch.bfloat16: 0.25, torch.float16: 0.1, torch.float32: 2.0**-10}
# For sparsemax a step can leave a fixed part of what it started from.
_SPARSEMAX_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 2.0**-16}


def _kind(alpha: float) -> int:
    return {1.0: SOFTMAX.value, 1.5: ENTMAX15.value, 2.0: SPARSEMAX.value}.get(alpha, ENTMAX.value)


def _list_shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    tiles = tiling(max(query.shape[3], value.shape[3]), query.dtype)
    q_tiles = (query.shape[2] + tiles.rows - 1) // tiles.rows
    k_tiles = (key.shape[2] + tiles.columns - 1) // tiles.columns
    return query.shape[0] * query.shape[1], q_tiles, k_tiles, tiles.rows


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor | None,
    slopes: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    query_positions: Tensor | None,
    alpha: float,
    scaling: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, and what the backward needs (empty unless ``training``).

    Returns:
        output (B, Hq, Lq, Dv); mean of values under ``x^(beta-1)``, same shape; rows (4, B * Hq, Lq rounded up to
        tiles) float32: scale, reference, offset, inverse normaliser; for each head and tile of queries a list of
        key tiles, its length, and flags, flattened.
    """
    query, key, value = aligned(query), aligned(key), aligned(value)
    tiles = tiling(max(query.shape[3], value.shape[3]), query.dtype)
    geometry = Geometry(query, key, value, tiles)
    heads, q_tiles, k_tiles = geometry.batch * geometry.q_heads, geometry.q_tiles, geometry.k_tiles
    kind = _kind(alpha)
    out = tokens_first(query, geometry.q_len, geometry.q_heads, geometry.value_dim)
    sparse = kind != SOFTMAX.value
    mean = torch.empty_like(out) if training and sparse else out.new_empty(0)
    # ptxas 12.8 (Triton 3.6) leaves the address of values narrower than keys undefined; wider ones are as rare.
    same_width = padded(geometry.dim) == padded(geometry.value_dim)
    short = sparse and same_width and 0 < geometry.k_len <= 2 * tiles.short.columns
    # The sparse kernels hand each other rows and candidates; one kernel alone writes them for the backward only.
    keep = training or (sparse and not short)
    rows = out.new_empty((4, heads, q_tiles * tiles.rows) if keep else (4, 0), dtype=torch.float32)
    lists = out.new_empty(heads * q_tiles * k_tiles if keep else 0, dtype=list_dtype(q_tiles, k_tiles))
    counts = out.new_empty(heads * q_tiles if keep else 0, dtype=torch.int32)
    flags = out.new_empty(heads * q_tiles * k_tiles if training else 0, dtype=torch.uint8)
    state = (mean, rows, lists, counts, flags)
    if out.numel() == 0:
        return out, *(state if training else _no_state(state))

    scale, reference, offset, inverse = rows.unbind()
    common = {
        "D": geometry.dim, "DP": padded(geometry.dim), "BM": tiles.rows,
        "HAS_SCALE": query_scale is not None, "HAS_SLOPES": slopes is not None,
        "HAS_POSITIONS": query_positions is not None, "PRECISION": geometry.precision,
    }  # fmt: skip
    values = {"DV": geometry.value_dim, "DVP": padded(geometry.value_dim), "TRAINING": training}
    ranges = (row_stride(key_start), 0 if query_positions is None else row_stride(query_positions))
    places = (*ranges, *geometry.sizes(), geometry.heads_at_once)
    visible = (key_start, key_end, query_positions)
    strides = strides_of(query, key, value)
    score_strides = strides[:6]
    grid = (q_tiles * heads,)
    if not sparse:
        if training:
            inverse.fill_(1.0)
            flags.zero_()
        softmax_forward_kernel[grid](
            query, key, value, query_scale, slopes, *visible, out, scale, reference, offset, lists, counts, flags,
            *strides, *places, scaling,
            EXACT=geometry.exact, **values, **common, **tiles.output.options(tiles.columns),
        )  # fmt: skip
        return out, *(state if training else _no_state(state))

    limits = _SPARSEMAX_TOLERANCE if kind == SPARSEMAX.value else _TOLERANCE
    factors = (scaling * (alpha - 1.0), alpha - 1.0, 1.0 / (alpha - 1.0))
    if short:
        short_kernel[(ceil_div(geometry.q_len, tiles.short_rows) * heads,)](
            query, key, value, query_scale, slopes, *visible, out, mean,
            scale, reference, offset, inverse, lists, counts, flags,
            *strides, *ranges, *geometry.sizes()[1:], *factors, limits[query.dtype],
            KIND=kind, EXACT=geometry.exact, TILE_M=tiles.rows, TILE_N=tiles.columns, BN=tiles.short.columns,
            **{**values, **common, "BM": tiles.short_rows, "num_warps": tiles.short.warps},
        )  # fmt: skip
        return out, *(state if training else _no_state(state))

    if scaling < 0 and query_scale is None:
        # The kernels look at signs where queries have scales.
        query_scale = query.new_ones(query.shape[:3])
        common["HAS_SCALE"] = True
    norms = None if slopes is None else _key_norms(key, tiles.columns)
    # What the output kernel writes there comes after the solver has read them.
    start, flatness = scale, inverse
    excess = rows.new_empty(heads, q_tiles, k_tiles)
    scratch = rows.new_empty(heads, q_tiles, tiles.rows // ROW_GROUP.value, min(k_tiles, CHUNK.value))
    sweep_kernel[grid](
        query, key, query_scale, slopes, norms, *visible, reference, offset, start, flatness,
        lists, excess, scratch, counts, flags,
        *score_strides, *places, *factors, KIND=kind, SAMPLE=_SAMPLE, TRAINING=training,
        **common, **tiles.sweep.options(),
    )  # fmt: skip
    solve_kernel[grid](
        query, key, query_scale, slopes, *visible, reference, offset, start, flatness, lists, counts,
        *score_strides, *places, *factors, limits[query.dtype],
        KIND=kind, EXACT=geometry.exact, **common, **tiles.solve.options(tiles.columns),
    )  # fmt: skip
    output_kernel[grid](
        query, key, value, query_scale, slopes, *visible, reference, offset, scale, inverse,
        out, mean, lists, counts, flags, *strides, *places, *factors,
        KIND=kind, EXACT=geometry.exact, **values, **common, **tiles.output.options(tiles.columns),
    )  # fmt: skip
    return out, *(state if training else _no_state(state))


def _no_state(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Empty tensors in place of what only the backward reads."""
    mean, rows, lists, counts, flags = state
    return mean, rows.new_empty(4, 0), lists.new_empty(0), counts.new_empty(0), flags


def _key_norms(key: Tensor, columns: int) -> Tensor:
    batch, heads, length, dim = key.shape
    tiles = ceil_div(length, columns)
    norms = key.new_empty(batch * heads, tiles, dtype=torch.float32)
    key_norms_kernel[(tiles, batch * heads)](
        key, norms, *strides_of(key), heads, length, tiles, D=dim, PADDED=padded(dim), BN=columns
    )
    return norms


forward_op = torch.library.custom_op("hf_sparse_attention::triton_forward", forward, mutates_args=())


@forward_op.register_fake
def _(query, key, value, query_scale, slopes, key_start, key_end, query_positions, alpha, scaling, training):
    heads, q_tiles, k_tiles, tile_rows = _list_shapes(query, key, value)
    out = tokens_first(query, query.shape[2], query.shape[1], value.shape[3])
    mean = torch.empty_like(out) if training and alpha != 1.0 else out.new_empty(0)
    # One dimension: compilers would ask of each of several whether it is 1.
    lists = heads * q_tiles * k_tiles if training else 0
    return (
        out,
        mean,
        out.new_empty((4, heads, q_tiles * tile_rows) if training else (4, 0), dtype=torch.float32),
        out.new_empty(lists, dtype=list_dtype(q_tiles, k_tiles)),
        out.new_empty(heads * q_tiles if training else 0, dtype=torch.int32),
        out.new_empty(lists, dtype=torch.uint8),
    )


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor | None,
    slopes: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    query_positions: Tensor | None,
    alpha: float,
    scaling: float,
) -> Tensor:
    """Output (B, Hq, Lq, Dv) for few queries and many keys; without gradients."""
    query, key, value = aligned(query), aligned(key), aligned(value)
    batch, q_heads, q_len, dim = query.shape
    k_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group, kind = q_heads // k_heads, _kind(alpha)
    rows = group * q_len
    geometry = Geometry(query, key, value, tiling(max(dim, value_dim), query.dtype))
    launch = decode_launch(max(dim, value_dim), query.dtype)
    out = tokens_first(query, q_len, q_heads, value_dim)
    blocks = ceil_div(k_len, launch.columns)
    per_split = max(1, blocks * batch * k_heads // _DECODE_PROGRAMS)
    splits = ceil_div(blocks, per_split)
    if out.numel() == 0 or k_len == 0:
        return out.zero_()

    scores = out.new_empty(batch * k_heads, rows, blocks * launch.columns, dtype=torch.float32)
    block_max = scores.new_empty(batch * k_heads, rows, blocks)
    row_lists = out.new_empty(batch * k_heads, rows, blocks, dtype=torch.int32)
    lists = row_lists.new_empty(batch * k_heads, blocks)
    reference, offset = scores.new_empty(2, batch * k_heads, rows)
    partial = scores.new_empty(batch * k_heads, rows, splits, value_dim)
    total = scores.new_empty(batch * k_heads, rows, splits)
    unit = LOG2_E if kind == SOFTMAX.value else alpha - 1.0
    beta = 1.0 if kind == SOFTMAX.value else 1.0 / unit
    limits = _SPARSEMAX_TOLERANCE if kind == SPARSEMAX.value else _TOLERANCE
    common = {
        "ROWS": max(16, triton.next_power_of_2(rows)), "BN": launch.columns, "STAGES": launch.stages,
        "PRECISION": geometry.precision, "num_warps": launch.warps,
    }  # fmt: skip
    decode_scores_kernel[(splits, batch * k_heads)](
        query, key, query_scale, slopes, key_start, key_end, query_positions, scores, block_max,
        *strides_of(query, key), row_stride(key_start), 0 if query_positions is None else row_stride(query_positions),
        q_heads, group, q_len, k_len, blocks, per_split, scaling * unit, unit, D=dim, DP=padded(dim),
        HAS_SCALE=query_scale is not None, HAS_SLOPES=slopes is not None,
        HAS_POSITIONS=query_positions is not None, **common,
    )  # fmt: skip
    decode_threshold_kernel[(batch * k_heads * rows,)](
        scores, block_max, reference, offset, row_lists, blocks, beta, limits[query.dtype],
        KIND=kind, BN=launch.columns, AT_ONCE=max(1, DECODE_SCORES // launch.columns), num_warps=16,
    )  # fmt: skip
    decode_output_kernel[(splits, batch * k_heads)](
        value, scores, block_max, reference, offset, lists, partial, total,
        *strides_of(value), k_heads, rows, k_len, blocks, per_split, splits, beta,
        KIND=kind, DV=value_dim, DVP=padded(value_dim), **common,
    )  # fmt: skip
    decode_combine_kernel[(batch * k_heads * rows,)](
        partial, total, key_start, key_end, out, q_heads, group, q_len, k_len, splits, row_stride(key_start),
        DV=value_dim, DVP=padded(value_dim), SPLITS=16,
    )  # fmt: skip
    return out


decode_op = torch.library.custom_op("hf_sparse_attention::triton_decode", decode, mutates_args=())


@decode_op.register_fake
def _(query, key, value, query_scale, slopes, key_start, key_end, query_positions, alpha, scaling):
    return tokens_first(query, query.shape[2], query.shape[1], value.shape[3])


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor | None,
    slopes: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    query_positions: Tensor | None,
    mean: Tensor,
    rows: Tensor,
    lists: Tensor,
    counts: Tensor,
    flags: Tensor,
    alpha: float,
    scaling: float,
    scale_gradient: bool,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and (empty unless asked for) query_scale and slopes."""
    query, key, value, grad = aligned(query), aligned(key), aligned(value), aligned(grad)
    tiles = tiling(max(query.shape[3], value.shape[3]), query.dtype)
    geometry = Geometry(query, key, value, tiles)
    batch, q_heads, _, q_len, k_len, q_tiles, k_tiles = geometry.sizes()
    k_heads, heads = geometry.k_heads, batch * q_heads
    grad_query = tokens_first(query, q_len, q_heads, geometry.dim)
    grad_key = tokens_first(key, k_len, k_heads, geometry.dim)
    grad_value = tokens_first(value, k_len, k_heads, geometry.value_dim)
    grad_scale = rows.new_empty((batch, q_heads, q_len) if scale_gradient else 0)
    slope_rows = rows.new_empty((batch, q_heads, q_len) if slope_gradient else 0)
    if grad_query.numel() == 0 or k_len == 0:
        zeros = [tensor.zero_() for tensor in (grad_query, grad_key, grad_value, grad_scale, slope_rows)]
        return *zeros[:4], _sum_slopes(zeros[4], slopes, slope_gradient)

    unit = LOG2_E if alpha == 1.0 else alpha - 1.0
    beta = 1.0 if alpha == 1.0 else 1.0 / (alpha - 1.0)
    # See the kernel of dK and dV: slopes need one more than other 16-bit inputs, float32 two.
    row_vectors = 8 if geometry.exact else 7 if slopes is not None else 6
    vectors = rows.new_empty(heads, q_tiles, row_vectors, tiles.rows)
    common = {
        "D": geometry.dim, "DP": padded(geometry.dim), "DV": geometry.value_dim, "DVP": padded(geometry.value_dim),
        "KIND": _kind(alpha), "HAS_SLOPES": slopes is not None, "HAS_POSITIONS": query_positions is not None,
        "PRECISION": geometry.precision, "EXACT": geometry.exact, "ROW_VECTORS": row_vectors,
    }  # fmt: skip
    position_stride = 0 if query_positions is None else row_stride(query_positions)
    strides, sizes = strides_of(query, key, value, grad), geometry.sizes()
    query_gradient_kernel[(q_tiles * heads,)](
        query, key, value, grad, mean, slopes, key_start, key_end, query_positions, *rows.unbind(),
        lists, counts, vectors, grad_query, grad_scale, slope_rows,
        *strides, row_stride(key_start), position_stride, *sizes, geometry.heads_at_once, scaling, unit, beta,
        BM=tiles.rows, SCALE_GRADIENT=scale_gradient, SLOPE_GRADIENT=slope_gradient,
        **common, **tiles.query.options(tiles.columns),
    )  # fmt: skip
    key_lists = lists.new_empty(heads, k_tiles, q_tiles)
    key_counts = counts.new_empty(heads, k_tiles)
    columns = 32
    transpose_list_kernel[(ceil_div(k_tiles, columns), heads)](
        flags, key_lists, key_counts, q_tiles, k_tiles, ROWS=64, COLS=columns
    )
    key_value_gradient_kernel[(ceil_div(k_len, tiles.key.columns) * batch * k_heads,)](
        query, key, value, grad, slopes, query_positions, vectors, key_lists, key_counts, grad_key, grad_value,
        *strides, position_stride, *sizes, unit, beta, TILE_M=tiles.rows, BM=tiles.key_rows,
        NEAR=near((query, grad), q_tiles * tiles.rows * row_vectors),
        **common, **tiles.key.options(tiles.columns),
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_scale, _sum_slopes(slope_rows, slopes, slope_gradient)


def _sum_slopes(slope_rows: Tensor, slopes: Tensor | None, wanted: bool) -> Tensor:
    return slope_rows.sum((0, 2)).to(slopes.dtype) if wanted else slope_rows


backward_op = torch.library.custom_op("hf_sparse_attention::triton_backward", backward, mutates_args=())


@backward_op.register_fake
def _(
    grad, query, key, value, query_scale, slopes, key_start, key_end, query_positions, mean, rows, lists, counts,
    flags, alpha, scaling, scale_gradient, slope_gradient,
):  # fmt: skip
    return (
        tokens_first(query, query.shape[2], query.shape[1], query.shape[3]),
        tokens_first(key, key.shape[2], key.shape[1], key.shape[3]),
        tokens_first(value, value.shape[2], value.shape[1], value.shape[3]),
        rows.new_empty(query.shape[:3] if scale_gradient else 0),
        query.new_empty(slopes.shape, dtype=slopes.dtype) if slope_gradient else rows.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    query, key, value, query_scale, slopes, key_start, key_end, query_positions, alpha, scaling, training = inputs
    out, mean, *state = output
    ctx.set_materialize_grads(False)
    ctx.alpha, ctx.scaling, ctx.training = alpha, scaling, training
    # For softmax the mean under p^1 is the output itself.
    mean = out if alpha == 1.0 else mean
    ctx.save_for_backward(query, key, value, query_scale, slopes, key_start, key_end, query_positions, mean, *state)


def _gradients(compute: Callable[..., tuple[Tensor, ...]], ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    if not ctx.training:
        raise RuntimeError("triton_forward was called with training=False; its output has no gradient.")
    query, key, value, query_scale, slopes, *rest = ctx.saved_tensors
    scale_gradient, slope_gradient = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    grads = compute(
        grad, query, key, value, query_scale, slopes, *rest, ctx.alpha, ctx.scaling, scale_gradient, slope_gradient
    )
    grad_scale = grads[3].to(query_scale.dtype) if scale_gradient else None
    return (*grads[:3], grad_scale, grads[4] if slope_gradient else None, *(None,) * 6)


forward_op.register_autograd(
    lambda ctx, grad, *_: _gradients(backward_op, ctx, grad),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
)


class EagerAttention(torch.autograd.Function):
    """The forward operator's output and its gradient without the dispatcher, which takes as long as the launches."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(backward, ctx, grad)
