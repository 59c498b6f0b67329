"""The whole forward where all scores of a row fit into registers: one kernel in place of sweep, solve and output."""

import triton
import triton.language as tl

from .launch import Launched
from .solve import MAX_PASSES
from .threshold import (
    NOTHING,
    SPARSEMAX,
    UNREACHABLE,
    converged,
    highest_offset,
    positive_part,
    powers,
    root,
    secant_flatness,
    solve_step,
)
from .tiles import (
    ALIGNMENT,
    distance,
    head_base,
    load_tile,
    mask_invisible,
    positions_of,
    query_factor,
    store_tile,
    visible_keys,
)


@triton.jit
def list_visible(
    LIST, COUNT, FLAGS, KEY_START, KEY_END, range_base, tile_index, q_tile, q_len, k_len, k_tiles,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Every tile of keys that some row of a tile of queries sees, for the backward."""
    rows = q_tile * TILE_M + tl.arange(0, TILE_M)
    _start, _end, _live, lo, hi, full_lo, full_hi = visible_keys(KEY_START, KEY_END, range_base, rows, q_len, k_len)
    lo_tile = lo // TILE_N
    tiles = tl.maximum(tl.cdiv(hi, TILE_N) - lo_tile, 0)
    LIST += tile_index * k_tiles
    FLAGS += tile_index * k_tiles
    for tile in range(0, k_tiles):
        partial = ((tile * TILE_N < full_lo) | ((tile + 1) * TILE_N > full_hi)).to(tl.int32)
        listed = (tile >= lo_tile) & (tile < lo_tile + tiles)
        tl.store(LIST + (tile - lo_tile), (2 * tile + partial).to(LIST.dtype.element_ty), mask=listed)
        tl.store(FLAGS + tile, tl.where(listed, 1 + partial, 0).to(tl.uint8))
    tl.store(COUNT + tile_index, tiles)


@triton.jit
def scores_of(
    q, K, stride, first, hi, cols, dims, c, slope, position, start, end,
    D: tl.constexpr, DP: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in units of ``(alpha - 1) z``, -inf where a row does not see a key. # [BM, BN]"""
    k = load_tile(K, stride, first, hi, cols, dims, D, DP)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * c[:, None]
    if HAS_SLOPES:
        scores = scores - slope * distance(position, first + cols)
    return mask_invisible(scores, first + cols, start, end)


@triton.jit
def sums_of(y, t, beta, KIND: tl.constexpr):
    """Sums of ``(y - t)^beta`` and ``(y - t)^(beta - 1)`` over the keys. # [BM], [BM]"""
    p, u = powers(positive_part(y - t[:, None]), beta, KIND)
    return tl.sum(p, 1), tl.sum(u, 1)


@triton.jit
def add_values(
    out, mean, f, d, y, t, narrow, V, stride, first, hi, cols, dims, beta,
    KIND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, TRAINING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``p V``, in training ``u V``, and the sums of p and u, added to those of other keys."""
    p, u = powers(positive_part((y - t[:, None]) * narrow[:, None]), beta, KIND)
    v = load_tile(V, stride, first, hi, cols, dims, DV, DVP)
    out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
    if TRAINING:
        d += tl.sum(u, 1)
        mean = tl.dot(u.to(v.dtype), v, mean, input_precision=PRECISION)
    return out, mean, f + tl.sum(p, 1), d


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn", "stride_range", "stride_position",
        "q_heads", "group", "q_len", "k_len", "q_tiles", "k_tiles",
    ]
)  # fmt: skip
def short_kernel(
    Q, K, V, QUERY_SCALE, SLOPES, KEY_START, KEY_END, QUERY_POSITIONS, OUT, MEAN,
    SCALE, REFERENCE, OFFSET, INVERSE, LIST, COUNT, FLAGS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_range, stride_position, q_heads, group, q_len, k_len, q_tiles, k_tiles,
    scale, alpha_minus_1, beta, tolerance,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_POSITIONS: tl.constexpr, TRAINING: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT of BM queries of one head and at most 2 BN keys; in training also MEAN, the rows and the lists.

    Grid: (ceil(q_len / BM) * batch * q_heads,). What is written is what :func:`output_kernel` writes, with every
    visible tile of TILE_M queries and TILE_N keys listed.
    """
    blocks = tl.cdiv(q_len, BM)
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = bh // q_heads
    h = bh % q_heads
    first = block * BM
    row = tl.arange(0, BM)
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DP)
    dims_v = tl.arange(0, DVP)
    range_base = tl.cast(b, tl.int64) * stride_range
    start, end, live, _lo, hi, _full_lo, _full_hi = visible_keys(
        KEY_START, KEY_END, range_base, first + row, q_len, k_len
    )
    q = load_tile(head_base(Q, stride_qb, stride_qh, b, h), stride_qn, first, q_len, row, dims, D, DP)
    K = head_base(K, stride_kb, stride_kh, b, h // group)
    V = head_base(V, stride_vb, stride_vh, b, h // group)
    c, negative = query_factor(QUERY_SCALE, b, h, q_heads, first, q_len, row, scale, HAS_SCALE)
    c = tl.where(negative, -c, c)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(SLOPES + h).to(tl.float32) * alpha_minus_1
    position_base = tl.cast(b, tl.int64) * stride_position
    position = positions_of(QUERY_POSITIONS, position_base, first + row, q_len, k_len, HAS_POSITIONS)
    # Two halves: what is computed from one takes half the registers.
    y = scores_of(q, K, stride_kn, 0, hi, cols, dims, c, slope, position, start, end, D, DP, HAS_SLOPES, PRECISION)
    z = scores_of(q, K, stride_kn, BN, hi, cols, dims, c, slope, position, start, end, D, DP, HAS_SLOPES, PRECISION)
    m = tl.maximum(tl.max(y, 1), tl.max(z, 1))
    # Rows that see no key, or only NaN, get a threshold above every score.
    found = live & (m > NOTHING)
    m = tl.where(found, m, 0.0)
    y = y - m[:, None]
    z = z - m[:, None]

    top = highest_offset(m)
    lo_t = tl.full([BM], -1.0, tl.float32)
    hi_t = top
    t = lo_t
    flatness = tl.zeros([BM], tl.float32) + (1.0 - 1.0 / beta)
    trust = tl.zeros([BM], tl.float32)
    former_f = tl.zeros([BM], tl.float32)
    former_d = former_f
    unsolved = tl.max(found.to(tl.int32), 0)
    passes = 0
    while (unsolved > 0) & (passes < MAX_PASSES):
        f, d = sums_of(y, t, beta, KIND)
        other_f, other_d = sums_of(z, t, beta, KIND)
        f += other_f
        d += other_d
        if KIND != SPARSEMAX:
            flatness, trust = secant_flatness(f, d, former_f, former_d, flatness, trust)
        t_new, lo_t, hi_t = solve_step(t, lo_t, hi_t, f, d, flatness, beta, KIND)
        t_new = tl.minimum(t_new, top)
        open_rows = found & (~converged(f, flatness, trust, beta, tolerance, KIND)) & (t_new != t)
        unsolved = tl.max(open_rows.to(tl.int32), 0)
        former_f = f
        former_d = d
        t = t_new
        passes += 1

    if not EXACT:
        # The threshold as the backward will read it: the normaliser absorbs what its rounding changes.
        t = (m + t) - m
    width = tl.where(found, -t, 1.0)
    t = tl.where(found, t, UNREACHABLE)
    narrow = 1.0 / width
    out = tl.zeros([BM, DVP], tl.float32)
    mean = tl.zeros([BM, DVP], tl.float32)
    f = tl.zeros([BM], tl.float32)
    d = tl.zeros([BM], tl.float32)
    out, mean, f, d = add_values(
        out, mean, f, d, y, t, narrow, V, stride_vn, 0, hi, cols, dims_v, beta, KIND, DV, DVP, TRAINING, PRECISION
    )
    out, mean, f, d = add_values(
        out, mean, f, d, z, t, narrow, V, stride_vn, BN, hi, cols, dims_v, beta, KIND, DV, DVP, TRAINING, PRECISION
    )
    # A row that sees keys but found no score has NaN inputs, and says so; a row that sees none gives zeros.
    poison = tl.where(live & (f == 0), float("nan"), 0.0)
    out = out * tl.where(f > 0, 1.0 / tl.where(f > 0, f, 1.0), poison)[:, None] + poison[:, None]
    stride = q_heads * (DV // ALIGNMENT)
    base = (tl.cast(b, tl.int64) * q_len * q_heads + h) * DV
    store_tile(OUT + base, stride, first, q_len, row, dims_v, out, DV, DVP)
    if TRAINING:
        mean = mean / tl.where(d > 0, d, 1.0)[:, None]
        store_tile(MEAN + base, stride, first, q_len, row, dims_v, mean, DV, DVP)
        inverse = tl.where(f > 0, narrow / tl.where(f > 0, root(f, beta, KIND), 1.0), 1.0)
        slot = tl.cast(bh, tl.int64) * q_tiles * TILE_M + first + row
        tl.store(SCALE + slot, c if EXACT else c * inverse)
        tl.store(REFERENCE + slot, m if EXACT else (m + t) * inverse)
        tl.store(OFFSET + slot, t)
        tl.store(INVERSE + slot, inverse)
        tile_index = tl.cast(bh, tl.int64) * q_tiles + first // TILE_M
        if first % TILE_M == 0:
            list_visible(
                LIST, COUNT, FLAGS, KEY_START, KEY_END, range_base, tile_index, first // TILE_M, q_len, k_len, k_tiles,
                TILE_M, TILE_N,
            )  # fmt: skip
        if block == blocks - 1:
            # The backward reads whole tiles: no score exceeds the threshold of a row past the last.
            after = first + BM + tl.arange(0, TILE_M)
            unused = tl.cast(bh, tl.int64) * q_tiles * TILE_M + after
            past = after < q_tiles * TILE_M
            one = tl.full([TILE_M], 1.0, tl.float32)
            tl.store(SCALE + unused, one, mask=past)
            tl.store(REFERENCE + unused, one * (0.0 if EXACT else UNREACHABLE), mask=past)
            tl.store(OFFSET + unused, one * UNREACHABLE, mask=past)
            tl.store(INVERSE + unused, one, mask=past)
