"""Third kernel of the forward: the output over the listed tiles, and what the backward needs."""

import triton
import triton.language as tl

from .launch import Launched
from .threshold import UNREACHABLE, positive_part, powers, root
from .tiles import (
    ALIGNMENT,
    distance,
    head_base,
    load_tile,
    margin,
    positions_of,
    query_factor,
    schedule,
    store_tile,
    visible_keys,
)


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn", "stride_range", "stride_position",
        "batch", "q_heads", "group", "q_len", "k_len", "q_tiles", "k_tiles", "heads_at_once",
    ]
)  # fmt: skip
def output_kernel(
    Q, K, V, QUERY_SCALE, SLOPES, KEY_START, KEY_END, QUERY_POSITIONS, REFERENCE, OFFSET, SCALE, INVERSE,
    OUT, MEAN, LIST, COUNT, FLAGS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_range, stride_position, batch, q_heads, group, q_len, k_len, q_tiles, k_tiles, heads_at_once,
    scale, alpha_minus_1, beta,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, TRAINING: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """OUT; in training also MEAN (of values under ``x^(beta-1)``), the rows' final scale, reference and normaliser,
    and the list reduced to tiles that hold support, with its flags.

    Grid: (q_tiles * batch * q_heads,). Weights are taken relative to a row's largest, so that they keep their
    precision in 16 bits, and divided by their sum: the exact entmax of scores divided by a factor next to 1.
    """
    q_tile, bh = schedule(tl.program_id(0), q_tiles, batch * q_heads, heads_at_once)
    b = bh // q_heads
    h = bh % q_heads
    K = head_base(K, stride_kb, stride_kh, b, h // group)
    V = head_base(V, stride_vb, stride_vh, b, h // group)
    row = tl.arange(0, BM)
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DP)
    rows = q_tile * BM + row
    start, end, live, _lo, hi, _full_lo, _full_hi = visible_keys(
        KEY_START, KEY_END, tl.cast(b, tl.int64) * stride_range, rows, q_len, k_len
    )
    position = positions_of(QUERY_POSITIONS, tl.cast(b, tl.int64) * stride_position, rows, q_len, k_len, HAS_POSITIONS)
    # Queries whose sign was changed would be an operand from registers, and products of those wait for one another.
    q = load_tile(head_base(Q, stride_qb, stride_qh, b, h), stride_qn, q_tile * BM, q_len, row, dims, D, DP)
    c, negative = query_factor(QUERY_SCALE, b, h, q_heads, q_tile * BM, q_len, row, scale, HAS_SCALE)
    c = tl.where(negative, -c, c)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(SLOPES + h).to(tl.float32) * alpha_minus_1
    raw_slope = slope / c
    tile_index = tl.cast(bh, tl.int64) * q_tiles + q_tile
    slot = tile_index * BM + row
    LIST += tile_index * k_tiles

    reference = tl.load(REFERENCE + slot)
    t = tl.load(OFFSET + slot)
    found = t < UNREACHABLE
    width = tl.where(found, -t, 1.0)
    narrow = 1.0 / width
    out_scale = c if EXACT else c * narrow
    tau = reference if EXACT else (reference + t) * narrow
    dims_v = tl.arange(0, DVP)
    out = tl.zeros([BM, DVP], tl.float32)
    mean = tl.zeros([BM, DVP], tl.float32)
    f = tl.zeros([BM], tl.float32)
    d = tl.zeros([BM], tl.float32)
    kept = 0
    holds = 0
    FLAGS += tile_index * k_tiles
    count = tl.load(COUNT + tile_index)
    for i in tl.range(0, count * PARTS, num_stages=STAGES):
        entry = tl.load(LIST + i // PARTS).to(tl.int32)
        first = (entry >> 1) * (PARTS * BN) + (i % PARTS) * BN
        fix = (entry & 1) != 0
        if HAS_SLOPES:
            fix = fix | (slope != 0)
        k = load_tile(K, stride_kn, first, hi, cols, dims, D, DP)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if fix:
            keys = first + cols
            if HAS_SLOPES:
                scores = scores - raw_slope[:, None] * distance(position, keys)
            # Of the sign that the factor makes -inf.
            hidden = tl.where(negative, float("inf"), float("-inf"))[:, None]
            visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
            scores = tl.where(visible, scores, hidden)
        x = positive_part(margin(scores, out_scale[:, None], tau[:, None], t[:, None], narrow[:, None], EXACT))
        p, u = powers(x, beta, KIND)
        tile_f = tl.sum(p, 1)
        f += tile_f
        v = load_tile(V, stride_vn, first, hi, cols, dims_v, DV, DVP)
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
        if TRAINING:
            d += tl.sum(u, 1)
            mean = tl.dot(u.to(v.dtype), v, mean, input_precision=PRECISION)
            holds = tl.maximum(holds, (tl.max(tile_f, 0) > 0).to(tl.int32))
            tl.store(LIST + kept, entry.to(LIST.dtype.element_ty))
            tl.store(FLAGS + (entry >> 1), (holds * (1 + (entry & 1))).to(tl.uint8))
            more_parts = tl.minimum((i + 1) % PARTS, 1)
            kept += holds * (1 - more_parts)
            holds *= more_parts

    # A row that sees keys but found no score has NaN inputs, and says so; a row that sees none gives zeros.
    poison = tl.where(live & (f == 0), float("nan"), 0.0)
    out = out * tl.where(f > 0, 1.0 / tl.where(f > 0, f, 1.0), poison)[:, None] + poison[:, None]
    stride = q_heads * (DV // ALIGNMENT)
    base = (tl.cast(b, tl.int64) * q_len * q_heads + h) * DV
    store_tile(OUT + base, stride, q_tile * BM, q_len, row, dims_v, out, DV, DVP)
    if TRAINING:
        mean = mean / tl.where(d > 0, d, 1.0)[:, None]
        store_tile(MEAN + base, stride, q_tile * BM, q_len, row, dims_v, mean, DV, DVP)
        inverse = tl.where(f > 0, narrow / tl.where(f > 0, root(f, beta, KIND), 1.0), 1.0)
        tl.store(SCALE + slot, c if EXACT else c * inverse)
        tl.store(INVERSE + slot, inverse)
        if not EXACT:
            tl.store(REFERENCE + slot, (reference + t) * inverse)
        tl.store(COUNT + tile_index, kept)
