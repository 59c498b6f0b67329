"""Forward for alpha = 1: online softmax with the same ranges, scale and distances as the sparse kernels."""

import triton
import triton.language as tl

from .launch import Launched
from .threshold import NOTHING, UNREACHABLE
from .tiles import (
    ALIGNMENT,
    distance,
    head_base,
    load_tile,
    mask_invisible,
    positions_of,
    schedule,
    store_tile,
    visible_keys,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
        "stride_vn", "stride_range", "stride_position", "batch", "q_heads", "group", "q_len", "k_len", "q_tiles",
        "k_tiles", "heads_at_once",
    ]
)  # fmt: skip
def softmax_forward_kernel(
    Q, K, V, QUERY_SCALE, SLOPES, KEY_START, KEY_END, QUERY_POSITIONS,
    OUT, ROW_SCALE, ROW_REFERENCE, ROW_OFFSET, LIST, COUNT, FLAGS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_range, stride_position, batch, q_heads, group, q_len, k_len, q_tiles, k_tiles, heads_at_once,
    scale,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, TRAINING: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per tile of BM queries of one head. Grid: (q_tiles * batch * q_heads,).

    ROW_REFERENCE and ROW_OFFSET receive the logarithm (base 2) of the normaliser, in units of ROW_SCALE * q.k.
    """
    q_tile, bh = schedule(tl.program_id(0), q_tiles, batch * q_heads, heads_at_once)
    b = bh // q_heads
    h = bh % q_heads
    K = head_base(K, stride_kb, stride_kh, b, h // group)
    V = head_base(V, stride_vb, stride_vh, b, h // group)
    row = tl.arange(0, BM)
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DP)
    dims_v = tl.arange(0, DVP)
    rows = q_tile * BM + row
    start, end, live, lo, hi, full_lo, full_hi = visible_keys(
        KEY_START, KEY_END, tl.cast(b, tl.int64) * stride_range, rows, q_len, k_len
    )
    position = positions_of(QUERY_POSITIONS, tl.cast(b, tl.int64) * stride_position, rows, q_len, k_len, HAS_POSITIONS)
    q = load_tile(head_base(Q, stride_qb, stride_qh, b, h), stride_qn, q_tile * BM, q_len, row, dims, D, DP)
    c = tl.full([BM], 1.0, tl.float32) * scale * LOG2_E
    if HAS_SCALE:
        row_index = tl.cast(bh, tl.int64) * q_len + rows
        c *= tl.load(QUERY_SCALE + row_index, mask=rows < q_len, other=0.0).to(tl.float32)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(SLOPES + h).to(tl.float32) * LOG2_E

    m = tl.full([BM], NOTHING, tl.float32)
    z = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, DVP], tl.float32)
    columns: tl.constexpr = PARTS * BN
    lo_tile = lo // columns
    tiles = tl.maximum(tl.cdiv(hi, columns) - lo_tile, 0)
    LIST += (tl.cast(bh, tl.int64) * q_tiles + q_tile) * k_tiles
    FLAGS += (tl.cast(bh, tl.int64) * q_tiles + q_tile) * k_tiles
    for i in tl.range(0, tiles * PARTS, num_stages=STAGES):
        tile = lo_tile + i // PARTS
        first = lo_tile * columns + i * BN
        k = load_tile(K, stride_kn, first, hi, cols, dims, D, DP)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * c[:, None]
        partial = (tile * columns < full_lo) | ((tile + 1) * columns > full_hi)
        fix = partial
        if HAS_SLOPES:
            fix = fix | (slope != 0)
        if fix:
            keys = first + cols
            if HAS_SLOPES:
                s = s - slope * distance(position, keys)
            s = mask_invisible(s, keys, start, end)
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        z = z * shrink + tl.sum(p, 1)
        v = load_tile(V, stride_vn, first, hi, cols, dims_v, DV, DVP)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        m = m_new
        if TRAINING:
            entry = 2 * tile + partial.to(tl.int32)
            tl.store(LIST + i // PARTS, entry.to(LIST.dtype.element_ty))
            tl.store(FLAGS + tile, (1 + partial.to(tl.int32)).to(tl.uint8))

    inverse_z = tl.where(live, 1.0 / tl.where(live, z, 1.0), 0.0)
    out_base = OUT + (tl.cast(b, tl.int64) * q_len * q_heads + h) * DV
    store_tile(
        out_base, q_heads * (DV // ALIGNMENT), q_tile * BM, q_len, row, dims_v, out * inverse_z[:, None], DV, DVP
    )
    if TRAINING:
        slot = (tl.cast(bh, tl.int64) * q_tiles + q_tile) * BM + row
        tl.store(ROW_SCALE + slot, c)
        offset = tl.where(live, tl.log2(tl.where(live, z, 1.0)), UNREACHABLE)
        m = tl.where(live, m, 0.0)
        tl.store(ROW_REFERENCE + slot, m if EXACT else m + offset)
        tl.store(ROW_OFFSET + slot, offset)
        tl.store(COUNT + tl.cast(bh, tl.int64) * q_tiles + q_tile, tiles)
