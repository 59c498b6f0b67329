"""First kernel of the forward: one dense sweep over the scores lists the tiles that can hold support."""

import triton
import triton.language as tl

from .launch import Launched
from .threshold import (
    NOTHING,
    UNREACHABLE,
    curvature,
    curvature_flatness,
    highest_offset,
    newton_step,
    power_step,
    powers,
    raise_bound,
)
from .tiles import head_base, load_query, load_tile, positions_of, schedule, tile_scores, visible_keys

# Tiles, or entries of a list, that are treated at once.
CHUNK = tl.constexpr(128)
# Rows whose scores are compared with their bounds as one: those of one warp.
ROW_GROUP = tl.constexpr(16)
# Sums over the largest scores of tiles stand for so many times themselves.
MAXIMA = tl.constexpr(2.0)
# Largest flatness with which the solver's start is extrapolated.
STEEPEST = tl.constexpr(0.9)


@Launched
@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_n", "heads", "k_len", "tiles"])
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
def group_max(values, BM: tl.constexpr):
    """Maximum over each ROW_GROUP rows. # [BM // ROW_GROUP]"""
    return tl.max(tl.reshape(values, [BM // ROW_GROUP, ROW_GROUP]), 1)


@triton.jit
def row_max(scores, negative, turned):
    """Maximum of each row; where ``turned``, of the negated scores of negative rows. # [BM]"""
    top = tl.max(scores, 1)
    if turned:
        top = tl.max(tl.where(negative[:, None], -scores, scores), 1)
    return top


@triton.jit
def alibi_range(NORMS, reach, t_min, slope, pos_min, pos_max, lo_tile, hi_tile, BN: tl.constexpr):
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


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_range",
        "stride_position", "batch", "q_heads", "group", "q_len", "k_len", "q_tiles", "k_tiles", "heads_at_once",
    ]
)  # fmt: skip
def sweep_kernel(
    Q, K, QUERY_SCALE, SLOPES, NORMS, KEY_START, KEY_END, QUERY_POSITIONS,
    REFERENCE, OFFSET, START, FLATNESS, LIST, EXCESS, SCRATCH, COUNT, FLAGS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_range, stride_position,
    batch, q_heads, group, q_len, k_len, q_tiles, k_tiles, heads_at_once, scale, alpha_minus_1, beta,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    SAMPLE: tl.constexpr, TRAINING: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Candidate tiles of BM queries of one head, and per row the maximum and a lower bound of the threshold.

    Grid: (q_tiles * batch * q_heads,). REFERENCE receives the row maximum in units of ``(alpha - 1) z``, OFFSET the
    bound relative to it, START where the solver should start, FLATNESS the flatness there (negative where it is not
    known: see ``power_step``), LIST entries ``2 * tile + (some row does not see the whole tile)``. ``scale`` is
    ``(alpha - 1) * scaling``. In training FLAGS is cleared for the output kernel.
    """
    q_tile, bh = schedule(tl.program_id(0), q_tiles, batch * q_heads, heads_at_once)
    b = bh // q_heads
    h = bh % q_heads
    K = head_base(K, stride_kb, stride_kh, b, h // group)
    row = tl.arange(0, BM)
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DP)
    rows = q_tile * BM + row
    start, end, live, lo, hi, full_lo, full_hi = visible_keys(
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
    EXCESS += tile_index * k_tiles

    if TRAINING:
        FLAGS += tile_index * k_tiles
        for base in range(0, k_tiles, CHUNK):
            index = base + tl.arange(0, CHUNK)
            tl.store(FLAGS + index, tl.zeros([CHUNK], tl.uint8), mask=index < k_tiles)

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
                    q, K, stride_kn, tile * BN, hi, cols, dims, start, end, position, raw_slope, negative, True,
                    D, DP, HAS_SCALE, HAS_SLOPES, PRECISION,
                )  # fmt: skip
                a_max = tl.max(a, 1) * c
                m, t, f, d = raise_bound(m, t, f, d, a * c[:, None], a_max, beta, KIND)
            # The sweep will meet these tiles again.
            f = tl.zeros([BM], tl.float32)
            d = tl.zeros([BM], tl.float32)
            q32 = q.to(tl.float32)
            reach = tl.max(tl.where(live, tl.sqrt(tl.sum(q32 * q32, 1)) * c, 0.0), 0)
            t_min = tl.min(tl.where(live, t, UNREACHABLE), 0)
            norms = NORMS + tl.cast(b * (q_heads // group) + h // group, tl.int64) * k_tiles
            lo_tile, hi_tile = alibi_range(norms, reach, t_min, slope, pos_min, pos_max, lo_tile, hi_tile, BN)

    # A tile is listed when some row has a score above its bound, which should therefore become good early: the tiles
    # that some row sees in part (the diagonal, for causal attention) and every SAMPLE-th of the others raise it.
    first_full = tl.minimum(tl.maximum(tl.cdiv(full_lo, BN), lo_tile), hi_tile)
    full = tl.maximum(tl.minimum(full_hi // BN, hi_tile) - first_full, 0)
    after = hi_tile - first_full - full
    sampled = tl.cdiv(full, SAMPLE)
    early = after + sampled + first_full - lo_tile
    first_t = t
    count = 0
    for i in tl.range(0, early, num_stages=STAGES):
        partial = (i < after) | (i >= after + sampled)
        tile = tl.where(i < after, hi_tile - 1 - i, tl.where(partial, lo_tile + i - after - sampled, 0))
        tile = tl.where(partial, tile, first_full + SAMPLE * (i - after))
        fix = partial | turned
        if HAS_SLOPES:
            fix = fix | (slope != 0)
        a = tile_scores(
            q, K, stride_kn, tile * BN, hi, cols, dims, start, end, position, raw_slope, negative, fix,
            D, DP, HAS_SCALE, HAS_SLOPES, PRECISION,
        )  # fmt: skip
        a_max = tl.max(a, 1) * c
        if tl.max(a_max - t, 0) > 0:
            m, t, f, d = raise_bound(m, t, f, d, a * c[:, None], a_max, beta, KIND)
            tl.store(LIST + count, (2 * tile + partial.to(tl.int32)).to(LIST.dtype.element_ty))
            tl.store(EXCESS + count, tl.max(a_max - first_t, 0))
            count += 1
        if i < 2:
            first_t = t

    # The rest is compared with the bounds that stand now, without a branch: by how much each tile exceeds them is kept
    # for each group of rows, and looked at after every CHUNK tiles. The sums go over the largest score of each tile.
    early_t = t
    early_count = count
    f = tl.zeros([BM], tl.float32)
    d = tl.zeros([BM], tl.float32)
    e = tl.zeros([BM], tl.float32)
    bounded = early_t > NOTHING
    group_index = tl.arange(0, BM // ROW_GROUP)
    SCRATCH += tile_index * (tl.minimum(k_tiles, CHUNK) * (BM // ROW_GROUP))
    for base in range(0, full - sampled, CHUNK):
        size = tl.minimum(full - sampled - base, CHUNK)
        tl.debug_barrier()
        for i in tl.range(0, size, num_stages=STAGES):
            tile = first_full + 1 + base + i + (base + i) // (SAMPLE - 1)
            fix = False
            if HAS_SLOPES:
                fix = (slope != 0) | turned
            a = tile_scores(
                q, K, stride_kn, tile * BN, hi, cols, dims, start, end, position, raw_slope, negative, fix,
                D, DP, HAS_SCALE, HAS_SLOPES, PRECISION,
            )  # fmt: skip
            a_max = row_max(a, negative, False if HAS_SLOPES else turned) * c
            m = tl.maximum(m, a_max)
            x = tl.where(bounded, tl.maximum(a_max - early_t, 0.0), 0.0)
            p, u = powers(x, beta, KIND)
            f += p
            d += u
            e += curvature(x, beta, KIND)
            tl.store(SCRATCH + i * (BM // ROW_GROUP) + group_index, group_max(a_max - early_t, BM))
        tl.debug_barrier()
        t = tl.where(live, tl.maximum(t, m - 1.0), t)
        risen = -group_max(tl.where(live, early_t - t, float("-inf")), BM)
        index = tl.arange(0, CHUNK)
        pointers = SCRATCH + index[:, None] * (BM // ROW_GROUP) + group_index[None, :]
        excess = tl.load(pointers, mask=index[:, None] < size, other=float("-inf"))
        excess = tl.max(tl.where(excess >= risen[None, :], excess, float("-inf")), 1)
        keep = (excess > 0).to(tl.int32)
        slots = count + tl.cumsum(keep, 0) - 1
        tile = first_full + 1 + base + index + (base + index) // (SAMPLE - 1)
        tl.store(LIST + slots, (2 * tile).to(LIST.dtype.element_ty), mask=keep > 0)
        tl.store(EXCESS + slots, excess, mask=keep > 0)
        count += tl.sum(keep, 0)

    newton_t = early_t + newton_step(f, d, beta, KIND)
    t = tl.where(live, tl.maximum(t, newton_t), t)
    flatness = tl.minimum(curvature_flatness(f, d, e, beta), STEEPEST)
    # Where the largest score alone bounds best, few others matter.
    guess = tl.where(m - 1.0 > newton_t, t, early_t + power_step(f * MAXIMA, d * MAXIMA, flatness, beta))
    guess = tl.maximum(tl.minimum(guess, 0.5 * (t + m)), t)

    # A tile whose scores exceeded former bounds by less than every bound has risen since cannot hold support.
    risen_first = tl.min(tl.where(live, t - first_t, float("inf")), 0)
    risen_early = tl.min(tl.where(live, t - early_t, float("inf")), 0)
    tl.debug_barrier()
    kept = 0
    for base in range(0, count, CHUNK):
        index = base + tl.arange(0, CHUNK)
        entry = tl.load(LIST + index, mask=index < count, other=0)
        excess = tl.load(EXCESS + index, mask=index < count, other=float("-inf"))
        keep = (excess >= tl.where(index < early_count, risen_first, risen_early)).to(tl.int32)
        tl.debug_barrier()
        tl.store(LIST + kept + tl.cumsum(keep, 0) - 1, entry, mask=keep > 0)
        kept += tl.sum(keep, 0)

    # Rows that see no key, or only NaN, get a threshold above every score.
    found = live & (m > NOTHING)
    tl.store(REFERENCE + slot, tl.where(found, m, 0.0))
    tl.store(OFFSET + slot, tl.where(found, tl.minimum(t - m, highest_offset(m)), UNREACHABLE))
    tl.store(START + slot, tl.where(found, tl.minimum(guess - m, highest_offset(m)), 0.0))
    tl.store(FLATNESS + slot, tl.where(f > 0, flatness, -flatness))
    tl.store(COUNT + tile_index, kept)
