"""Second kernel of the forward: the threshold of every row, by a few passes over the listed tiles."""

import triton
import triton.language as tl

from .launch import Launched
from .threshold import (
    ESTIMATED,
    SPARSEMAX,
    UNREACHABLE,
    converged,
    highest_offset,
    positive_part,
    powers,
    secant_flatness,
    solve_step,
)
from .tiles import head_base, load_query, margin, positions_of, schedule, tile_scores, visible_keys

# Enough for bisection to reach float32 resolution; two are usual.
MAX_PASSES = tl.constexpr(40)


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_range",
        "stride_position", "batch", "q_heads", "group", "q_len", "k_len", "q_tiles", "k_tiles", "heads_at_once",
    ]
)  # fmt: skip
def solve_kernel(
    Q, K, QUERY_SCALE, SLOPES, KEY_START, KEY_END, QUERY_POSITIONS, REFERENCE, OFFSET, START, FLATNESS, LIST, COUNT,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_range, stride_position,
    batch, q_heads, group, q_len, k_len, q_tiles, k_tiles, heads_at_once, scale, alpha_minus_1, beta, tolerance,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_POSITIONS: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Replace the lower bounds in OFFSET by thresholds.

    Grid: (q_tiles * batch * q_heads,).
    """
    q_tile, bh = schedule(tl.program_id(0), q_tiles, batch * q_heads, heads_at_once)
    b = bh // q_heads
    h = bh % q_heads
    K = head_base(K, stride_kb, stride_kh, b, h // group)
    row = tl.arange(0, BM)
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DP)
    rows = q_tile * BM + row
    start, end, _live, _lo, hi, _full_lo, _full_hi = visible_keys(
        KEY_START, KEY_END, tl.cast(b, tl.int64) * stride_range, rows, q_len, k_len
    )
    position = positions_of(QUERY_POSITIONS, tl.cast(b, tl.int64) * stride_position, rows, q_len, k_len, HAS_POSITIONS)
    q, c, negative = load_query(
        Q, QUERY_SCALE, stride_qb, stride_qh, stride_qn, b, h, q_heads, q_tile * BM, q_len, row, dims, scale,
        D, DP, HAS_SCALE,
    )  # fmt: skip
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(SLOPES + h).to(tl.float32) * alpha_minus_1
    raw_slope = slope / c
    turned = False
    if HAS_SCALE:
        turned = tl.max(negative.to(tl.int32), 0) > 0
    tile_index = tl.cast(bh, tl.int64) * q_tiles + q_tile
    slot = tile_index * BM + row
    LIST += tile_index * k_tiles

    reference = tl.load(REFERENCE + slot)
    lo_t = tl.load(OFFSET + slot)
    found = lo_t < UNREACHABLE
    hi_t = tl.where(found, highest_offset(reference), lo_t)
    top = hi_t
    t = tl.where(found, tl.load(START + slot), lo_t)
    flatness = tl.load(FLATNESS + slot)
    trust = tl.where(flatness < 0, 0.0, ESTIMATED)
    flatness = tl.abs(flatness)
    former_f = tl.zeros([BM], tl.float32)
    former_d = former_f
    count = tl.load(COUNT + tile_index)
    unsolved = count
    passes = 0
    while (unsolved > 0) & (passes < MAX_PASSES):
        tau = reference if EXACT else reference + t
        f = tl.zeros([BM], tl.float32)
        d = tl.zeros([BM], tl.float32)
        for i in tl.range(0, count * PARTS, num_stages=STAGES):
            entry = tl.load(LIST + i // PARTS).to(tl.int32)
            first = (entry >> 1) * (PARTS * BN) + (i % PARTS) * BN
            fix = ((entry & 1) != 0) | turned
            if HAS_SLOPES:
                fix = fix | (slope != 0)
            a = tile_scores(
                q, K, stride_kn, first, hi, cols, dims, start, end, position, raw_slope, negative, fix,
                D, DP, HAS_SCALE, HAS_SLOPES, PRECISION,
            )  # fmt: skip
            x = positive_part(margin(a, c[:, None], tau[:, None], t[:, None], 1.0, EXACT))
            p, u = powers(x, beta, KIND)
            f += tl.sum(p, 1)
            d += tl.sum(u, 1)
        if KIND != SPARSEMAX:
            flatness, trust = secant_flatness(f, d, former_f, former_d, flatness, trust)
        t_new, lo_t, hi_t = solve_step(t, lo_t, hi_t, f, d, flatness, beta, KIND)
        t_new = tl.minimum(t_new, top)
        # A step below the resolution of tau changes nothing.
        stuck = t_new == t if EXACT else (reference + t_new) == tau
        open_rows = found & (~converged(f, flatness, trust, beta, tolerance, KIND)) & (~stuck)
        unsolved = tl.max(open_rows.to(tl.int32), 0)
        former_f = f
        former_d = d
        t = tl.where(found, t_new, t)
        passes += 1
    tl.store(OFFSET + slot, tl.where(passes > 0, t, lo_t))
