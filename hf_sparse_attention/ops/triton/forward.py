"""Forward: one dense sweep that lists the tiles which can hold support, the threshold over that list, the output."""

import triton
import triton.language as tl

from .threshold import (
    NOTHING,
    UNREACHABLE,
    curvature,
    highest_offset,
    powers,
    raise_bound,
    root,
    solve_step,
)
from .tiles import (
    ALIGNMENT,
    distance,
    head_base,
    load_tile,
    margin,
    mask_invisible,
    positions_of,
    schedule,
    store_tile,
    visible_keys,
)

# Enough for bisection to reach float32 resolution; in practice one to three passes converge.
MAX_PASSES = tl.constexpr(40)


@triton.jit(do_not_specialize=["stride_b", "stride_h", "heads", "k_len", "tiles"])
def key_norms_kernel(
    K,
    NORMS,
    stride_b,
    stride_h,
    stride_n,
    heads,
    k_len,
    tiles,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BN: tl.constexpr,
):
    """Largest key norm of each tile of BN keys. Grid: (tiles, batch * key heads)."""
    tile = tl.program_id(0)
    bh = tl.program_id(1)
    base = head_base(K, stride_b, stride_h, bh // heads, bh % heads)
    k = load_tile(base, stride_n, tile * BN, k_len, tl.arange(0, BN), tl.arange(0, PADDED), D, PADDED).to(tl.float32)
    tl.store(NORMS + bh * tiles + tile, tl.sqrt(tl.max(tl.sum(k * k, 1), 0)))


@triton.jit
def tile_scores(
    q, K, stride, first, limit, cols, dims, start, end, position, slope, fix,
    D: tl.constexpr, PADDED: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one tile before the row's scale; masked and with the ALiBi term where ``fix``. # [BM, BN]"""
    k = load_tile(K, stride, first, limit, cols, dims, D, PADDED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if fix:
        keys = first + cols
        if HAS_SLOPES:
            scores = scores - slope[:, None] * distance(position, keys)
        scores = mask_invisible(scores, keys, start, end)
    return scores


@triton.jit
def alibi_range(NORMS, reach, t_min, slope, pos_min, pos_max, lo_tile, hi_tile, BN: tl.constexpr, CHUNK: tl.constexpr):
    """Tiles between which support can lie: ``|q| |k| scale - slope * distance`` must exceed the lowest bound."""
    new_lo = hi_tile
    new_hi = lo_tile
    for first in range(lo_tile, hi_tile, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        norm = tl.load(NORMS + tile, mask=tile < hi_tile, other=0.0)
        gap = tl.maximum(pos_min - ((tile + 1) * BN - 1).to(tl.float32), (tile * BN).to(tl.float32) - pos_max)
        highest = reach * norm * 1.001 - slope * tl.maximum(gap, 0.0)
        can = (highest + 1.0e-5 * (tl.abs(t_min) + 1.0) > t_min) & (tile < hi_tile)
        new_lo = tl.minimum(new_lo, tl.min(tl.where(can, tile, hi_tile), 0))
        new_hi = tl.maximum(new_hi, tl.max(tl.where(can, tile + 1, lo_tile), 0))
    return new_lo, new_hi


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
        "stride_vn", "stride_range", "stride_position", "batch", "q_heads", "group", "q_len", "k_len", "q_tiles",
        "k_tiles", "heads_at_once",
    ]
)  # fmt: skip
def entmax_forward_kernel(
    Q, K, V, QUERY_SCALE, SLOPES, NORMS, KEY_START, KEY_END, QUERY_POSITIONS,
    OUT, MEAN, ROW_SCALE, ROW_REFERENCE, ROW_OFFSET, INVERSE, LIST, COUNT, FLAGS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_range, stride_position, batch, q_heads, group, q_len, k_len, q_tiles, k_tiles, heads_at_once,
    scale, alpha_minus_1, beta, tolerance,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, TRAINING: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per tile of BM queries of one head. Grid: (q_tiles * batch * q_heads,).

    Writes OUT; in training also MEAN (the mean of values under weights x^(beta-1), for the backward), the row's
    normalised scale and threshold, the list of tiles that hold support with its length, and its flags.
    ``scale`` is ``(alpha - 1) * scaling``.
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
    start, end, live, lo, hi, full_lo, full_hi = visible_keys(
        KEY_START, KEY_END, tl.cast(b, tl.int64) * stride_range, rows, q_len, k_len
    )
    position = positions_of(QUERY_POSITIONS, tl.cast(b, tl.int64) * stride_position, rows, q_len, k_len, HAS_POSITIONS)

    q = load_tile(head_base(Q, stride_qb, stride_qh, b, h), stride_qn, q_tile * BM, q_len, row, dims, D, DP)
    signed_scale = tl.full([BM], 1.0, tl.float32) * scale
    if HAS_SCALE:
        row_index = tl.cast(bh, tl.int64) * q_len + rows
        signed_scale *= tl.load(QUERY_SCALE + row_index, mask=rows < q_len, other=0.0).to(tl.float32)
    # A positive scale commutes with the row maximum; the sign goes to the query, where it is exact.
    q = tl.where((signed_scale < 0)[:, None], -q, q)
    c = tl.maximum(tl.abs(signed_scale), 1.0e-25)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(SLOPES + h).to(tl.float32) * alpha_minus_1
    raw_slope = slope / c

    m = tl.full([BM], NOTHING, tl.float32)
    t = tl.where(live, NOTHING, UNREACHABLE)
    f = tl.zeros([BM], tl.float32)
    d = tl.zeros([BM], tl.float32)
    lo_tile = lo // BN
    hi_tile = tl.maximum(tl.cdiv(hi, BN), lo_tile)

    if HAS_SLOPES:
        pos_min = tl.min(tl.where(live, position, float("inf")), 0)
        pos_max = tl.max(tl.where(live, position, float("-inf")), 0)
        if (hi_tile > lo_tile) & (slope > 0):
            # Bounds from the tiles around the queries' own positions, then the range within which support can lie.
            near = tl.minimum(tl.maximum((pos_min / BN).to(tl.int32), lo_tile), hi_tile - 1)
            near_end = tl.minimum(tl.maximum((pos_max / BN).to(tl.int32), lo_tile), hi_tile - 1) + 1
            for tile in range(near, near_end):
                a = tile_scores(
                    q, K, stride_kn, tile * BN, hi, cols, dims, start, end, position, raw_slope, True,
                    D, DP, HAS_SLOPES, PRECISION,
                )  # fmt: skip
                a_max = tl.max(a, 1) * c
                m, t, f, d = raise_bound(m, t, f, d, a * c[:, None], a_max, beta, KIND)
            f = tl.zeros([BM], tl.float32)
            d = tl.zeros([BM], tl.float32)
            q32 = q.to(tl.float32)
            reach = tl.max(tl.where(live, tl.sqrt(tl.sum(q32 * q32, 1)) * c, 0.0), 0)
            t_min = tl.min(tl.where(live, t, UNREACHABLE), 0)
            norms = NORMS + tl.cast(b * (q_heads // group) + h // group, tl.int64) * k_tiles
            lo_tile, hi_tile = alibi_range(norms, reach, t_min, slope, pos_min, pos_max, lo_tile, hi_tile, BN, 256)

    # Dense sweep: a tile is listed when some row has a score above its bound. Last tile first (the diagonal, for
    # causal attention), then the first (attention sinks), then backwards: the bound is good early.
    tiles = tl.maximum(hi_tile - lo_tile, 0)
    LIST += (tl.cast(bh, tl.int64) * q_tiles + q_tile) * k_tiles
    count = 0
    for i in tl.range(0, tiles, num_stages=STAGES):
        tile = tl.where(i == 0, hi_tile - 1, tl.where(i == 1, lo_tile, hi_tile - i))
        first = tile * BN
        fix = (first < full_lo) | (first + BN > full_hi)
        if HAS_SLOPES:
            fix = fix | (slope != 0)
        a = tile_scores(
            q, K, stride_kn, first, hi, cols, dims, start, end, position, raw_slope, fix,
            D, DP, HAS_SLOPES, PRECISION,
        )  # fmt: skip
        a_max = tl.max(a, 1) * c
        if tl.max(a_max - t, 0) > 0:
            m, t, f, d = raise_bound(m, t, f, d, a * c[:, None], a_max, beta, KIND)
            partial = (first < full_lo) | (first + BN > full_hi)
            tl.store(LIST + count, (2 * tile + partial.to(tl.int32)).to(LIST.dtype.element_ty))
            count += 1

    # From here on thresholds are offsets from the row maximum. Rows without a score keep no weight at any tile.
    found = live & (m > NOTHING)
    reference = tl.where(found, m, 0.0)
    top = tl.where(found, highest_offset(m), UNREACHABLE)
    t = tl.where(found, tl.minimum(t - m, top), UNREACHABLE)
    lo_t = t
    hi_t = top
    unsolved = count
    passes = 0
    while (unsolved > 0) & (passes < MAX_PASSES):
        tl.debug_barrier()
        f = tl.zeros([BM], tl.float32)
        d = tl.zeros([BM], tl.float32)
        e = tl.zeros([BM], tl.float32)
        kept = 0
        for i in tl.range(0, count, num_stages=STAGES):
            entry = tl.load(LIST + i).to(tl.int32)
            first = (entry >> 1) * BN
            fix = (entry & 1) != 0
            if HAS_SLOPES:
                fix = fix | (slope != 0)
            a = tile_scores(
                q, K, stride_kn, first, hi, cols, dims, start, end, position, raw_slope, fix,
                D, DP, HAS_SLOPES, PRECISION,
            )  # fmt: skip
            x = tl.maximum((a * c[:, None] - reference[:, None]) - t[:, None], 0.0)
            p, u = powers(x, beta, KIND)
            f += tl.sum(p, 1)
            d += tl.sum(u, 1)
            e += tl.sum(curvature(x, beta, KIND), 1)
            if passes == 0:
                # t is still a lower bound of every row: a tile without weight now holds no support.
                tl.store(LIST + kept, entry.to(LIST.dtype.element_ty))
                kept += (tl.max(tl.max(x, 1), 0) > 0).to(tl.int32)
        if passes == 0:
            count = kept
        residual = tl.where(found, tl.abs(root(f, beta, KIND) - 1.0), 0.0)
        unsolved = (tl.max(residual, 0) > tolerance).to(tl.int32)
        t_new, lo_t, hi_t = solve_step(t, lo_t, hi_t, f, d, e, beta, KIND)
        t = tl.where(found, tl.minimum(t_new, top), t)
        passes += 1

    # Output over the list. Weights are taken relative to the largest, so that they keep their precision in 16 bits.
    width = tl.where(found, -t, 1.0)
    narrow = 1.0 / width
    out_scale = c if EXACT else c * narrow
    out_reference = reference if EXACT else (reference + t) * narrow
    dims_v = tl.arange(0, DVP)
    out = tl.zeros([BM, DVP], tl.float32)
    mean = tl.zeros([BM, DVP], tl.float32)
    f = tl.zeros([BM], tl.float32)
    d = tl.zeros([BM], tl.float32)
    kept = 0
    FLAGS += (tl.cast(bh, tl.int64) * q_tiles + q_tile) * k_tiles
    tl.debug_barrier()
    for i in tl.range(0, count, num_stages=STAGES):
        entry = tl.load(LIST + i).to(tl.int32)
        first = (entry >> 1) * BN
        fix = (entry & 1) != 0
        if HAS_SLOPES:
            fix = fix | (slope != 0)
        a = tile_scores(
            q, K, stride_kn, first, hi, cols, dims, start, end, position, raw_slope, fix,
            D, DP, HAS_SLOPES, PRECISION,
        )  # fmt: skip
        x = margin(a, out_scale[:, None], out_reference[:, None], t[:, None], narrow[:, None], EXACT)
        x = tl.maximum(x, 0.0)
        p, u = powers(x, beta, KIND)
        f += tl.sum(p, 1)
        v = load_tile(V, stride_vn, first, hi, cols, dims_v, DV, DVP)
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
        if TRAINING:
            d += tl.sum(u, 1)
            mean = tl.dot(u.to(v.dtype), v, mean, input_precision=PRECISION)
            holds = (tl.max(tl.max(x, 1), 0) > 0).to(tl.int32)
            tl.store(LIST + kept, entry.to(LIST.dtype.element_ty))
            tl.store(FLAGS + (entry >> 1), (holds * (1 + (entry & 1))).to(tl.uint8))
            kept += holds

    # A row that sees keys but found no score has NaN inputs, and says so; a row that sees none gives zeros.
    poison = tl.where(live & (f == 0), float("nan"), 0.0)
    inverse_f = tl.where(f > 0, 1.0 / tl.where(f > 0, f, 1.0), poison)
    out_base = OUT + (tl.cast(b, tl.int64) * q_len * q_heads + h) * DV
    store_tile(
        out_base,
        q_heads * (DV // ALIGNMENT),
        q_tile * BM,
        q_len,
        row,
        dims_v,
        out * inverse_f[:, None] + poison[:, None],
        DV,
        DVP,
    )
    if TRAINING:
        mean_base = MEAN + (tl.cast(b, tl.int64) * q_len * q_heads + h) * DV
        mean = mean / tl.where(d > 0, d, 1.0)[:, None]
        store_tile(mean_base, q_heads * (DV // ALIGNMENT), q_tile * BM, q_len, row, dims_v, mean, DV, DVP)
        inverse = tl.where(f > 0, 1.0 / (width * tl.where(f > 0, root(f, beta, KIND), 1.0)), 1.0)
        slot = (tl.cast(bh, tl.int64) * q_tiles + q_tile) * BM + row
        signed = tl.where(signed_scale < 0, -c, c)
        tl.store(ROW_SCALE + slot, signed if EXACT else signed * inverse)
        tl.store(ROW_REFERENCE + slot, reference if EXACT else (reference + t) * inverse)
        tl.store(ROW_OFFSET + slot, t)
        tl.store(INVERSE + slot, inverse)
        tl.store(COUNT + tl.cast(bh, tl.int64) * q_tiles + q_tile, kept)
