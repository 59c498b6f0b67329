"""First kernel of the forward: one dense sweep over the scores lists the tiles that can hold support."""

import triton
import triton.language as tl

from .threshold import NOTHING, UNREACHABLE, highest_offset, raise_bound
from .tiles import head_base, load_query, load_tile, positions_of, schedule, tile_scores, visible_keys

# Entries of a list that are treated at once.
CHUNK = tl.constexpr(256)


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


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_range",
        "stride_position", "batch", "q_heads", "group", "q_len", "k_len", "q_tiles", "k_tiles", "heads_at_once",
    ]
)  # fmt: skip
def sweep_kernel(
    Q, K, QUERY_SCALE, SLOPES, NORMS, KEY_START, KEY_END, QUERY_POSITIONS,
    REFERENCE, OFFSET, LIST, EXCESS, COUNT,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_range, stride_position,
    batch, q_heads, group, q_len, k_len, q_tiles, k_tiles, heads_at_once, scale, alpha_minus_1, beta,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    SAMPLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Candidate tiles of BM queries of one head, and per row the maximum and a lower bound of the threshold.

    Grid: (q_tiles * batch * q_heads,). REFERENCE receives the row maximum in units of ``(alpha - 1) z``, OFFSET the
    bound relative to it, LIST entries ``2 * tile + (some row does not see the whole tile)``. ``scale`` is
    ``(alpha - 1) * scaling``.
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
    q, c, _negative = load_query(
        Q, QUERY_SCALE, stride_qb, stride_qh, stride_qn, b, h, q_heads, q_tile * BM, q_len, row, dims, scale,
        D, DP, HAS_SCALE,
    )  # fmt: skip
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(SLOPES + h).to(tl.float32) * alpha_minus_1
    raw_slope = slope / c
    tile_index = tl.cast(bh, tl.int64) * q_tiles + q_tile
    slot = tile_index * BM + row
    LIST += tile_index * k_tiles
    EXCESS += tile_index * k_tiles

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
            # The sweep will meet these tiles again.
            f = tl.zeros([BM], tl.float32)
            d = tl.zeros([BM], tl.float32)
            q32 = q.to(tl.float32)
            reach = tl.max(tl.where(live, tl.sqrt(tl.sum(q32 * q32, 1)) * c, 0.0), 0)
            t_min = tl.min(tl.where(live, t, UNREACHABLE), 0)
            norms = NORMS + tl.cast(b * (q_heads // group) + h // group, tl.int64) * k_tiles
            lo_tile, hi_tile = alibi_range(norms, reach, t_min, slope, pos_min, pos_max, lo_tile, hi_tile, BN)

    # A tile is listed when some row has a score above its bound, which should therefore become good early: last tile
    # first (the diagonal, for causal attention), then the first (attention sinks), then every eighth, then the rest.
    tiles = tl.maximum(hi_tile - lo_tile, 0)
    early = tl.cdiv(tiles, SAMPLE)
    second = tl.where(early > 1, SAMPLE, 1)
    early_t = t
    count = 0
    for i in tl.range(0, tiles, num_stages=STAGES):
        rest = i - early
        back = tl.where(i < early, SAMPLE * i, rest + rest // (SAMPLE - 1) + 1)
        back = tl.where(i == 1, tiles - 1, tl.where((i > 1) & (back == tiles - 1), second, back))
        tile = hi_tile - 1 - back
        first = tile * BN
        partial = (first < full_lo) | (first + BN > full_hi)
        fix = partial
        if HAS_SLOPES:
            fix = fix | (slope != 0)
        a = tile_scores(
            q, K, stride_kn, first, hi, cols, dims, start, end, position, raw_slope, fix,
            D, DP, HAS_SLOPES, PRECISION,
        )  # fmt: skip
        a_max = tl.max(a, 1) * c
        if tl.max(a_max - t, 0) > 0:
            m, t, f, d = raise_bound(m, t, f, d, a * c[:, None], a_max, beta, KIND)
            tl.store(LIST + count, (2 * tile + partial.to(tl.int32)).to(LIST.dtype.element_ty))
            tl.store(EXCESS + count, tl.max(a_max - early_t, 0))
            count += 1
        if i < 2:
            early_t = t

    # A tile whose scores exceeded the early bounds by less than every bound has risen since cannot hold support.
    risen = tl.min(tl.where(live, t - early_t, float("inf")), 0)
    tl.debug_barrier()
    kept = 0
    for first in range(0, count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        entry = tl.load(LIST + index, mask=index < count, other=0)
        keep = (tl.load(EXCESS + index, mask=index < count, other=float("-inf")) >= risen).to(tl.int32)
        tl.store(LIST + kept + tl.cumsum(keep, 0) - 1, entry, mask=keep > 0)
        kept += tl.sum(keep, 0)

    # Rows that see no key, or only NaN, get a threshold above every score.
    found = live & (m > NOTHING)
    tl.store(REFERENCE + slot, tl.where(found, m, 0.0))
    tl.store(OFFSET + slot, tl.where(found, tl.minimum(t - m, highest_offset(m)), UNREACHABLE))
    tl.store(COUNT + tile_index, kept)
