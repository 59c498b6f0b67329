"""What every kernel does with one tile of queries or scores: scheduling, visible ranges, masks and distances."""

import triton
import triton.language as tl

# Strides are passed in units of this many elements: the compiler sees that rows can be read by 16 bytes.
ALIGNMENT = tl.constexpr(8)


@triton.jit
def schedule(pid, q_tiles, heads, heads_at_once):
    """Map a program to (query tile, batch * head): heavy causal tiles first, few heads at a time to stay in the L2."""
    wave = pid // (heads_at_once * q_tiles)
    within = pid - wave * heads_at_once * q_tiles
    wave_heads = tl.minimum(heads_at_once, heads - wave * heads_at_once)
    return q_tiles - 1 - within // wave_heads, wave * heads_at_once + within % wave_heads


@triton.jit
def visible_keys(KEY_START, KEY_END, base, rows, q_len, k_len):
    """Half-open key range of each row, whether it is empty, and the tile's outer and inner range.

    Returns ``start, end, live`` # [BM], and scalars ``lo, hi`` (every visible key lies in [lo, hi)) and ``full_lo,
    full_hi`` (every live row sees every key of [full_lo, full_hi)).
    """
    inside = rows < q_len
    start = tl.maximum(tl.load(KEY_START + base + rows, mask=inside, other=0), 0)
    end = tl.minimum(tl.load(KEY_END + base + rows, mask=inside, other=0), k_len)
    live = end > start
    lo = tl.min(tl.where(live, start, k_len), 0)
    hi = tl.max(tl.where(live, end, 0), 0)
    full_lo = tl.max(tl.where(live, start, 0), 0)
    full_hi = tl.min(tl.where(live, end, k_len), 0)
    return start, end, live, lo, hi, full_lo, full_hi


@triton.jit
def positions_of(QUERY_POSITIONS, base, rows, q_len, k_len, HAS_POSITIONS: tl.constexpr):
    """Positions of the rows for the ALiBi distance, float32. # [BM]"""
    if HAS_POSITIONS:
        return tl.load(QUERY_POSITIONS + base + rows, mask=rows < q_len, other=0).to(tl.float32)
    else:
        return (rows + (k_len - q_len)).to(tl.float32)


@triton.jit
def distance(position, keys):
    """``|position_i - j|`` in float32 (exact up to 2^24). # [BM, BN]"""
    return tl.abs(position[:, None] - keys[None, :].to(tl.float32))


@triton.jit
def mask_invisible(scores, keys, start, end):
    """-inf where a row does not see a key. # [BM, BN]"""
    visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def load_tile(base, stride, first, limit, rows, dims, D: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``first + rows`` of a matrix with D columns, zero from row ``limit`` on and past D. # [BM, PADDED]

    The tile's origin is a 64-bit scalar; offsets within a tile are loop-invariant and fit in 32 bits.
    """
    stride = stride * ALIGNMENT
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    mask = rows[:, None] < limit - first
    if D != PADDED:
        mask = mask & (dims[None, :] < D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_rows(base, stride, rows, limit, dims, D: tl.constexpr, PADDED: tl.constexpr, NEAR: tl.constexpr):
    """The given rows of a matrix with D columns, row ``limit - 1`` in place of those after it. # [BM, PADDED]

    For rows that change in a loop, where 64-bit offsets would take registers. NEAR: the matrix spans less than 2^31
    elements, so that offsets from its first element, which is addressed by 64 bits, fit in 32.
    """
    rows = tl.minimum(rows, limit - 1)
    if not NEAR:
        rows = rows.to(tl.int64)
    pointers = base + dims[None, :] + (rows * (stride * ALIGNMENT))[:, None]
    if D != PADDED:
        return tl.load(pointers, mask=dims[None, :] < D, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(base, stride, first, limit, rows, dims, values, D: tl.constexpr, PADDED: tl.constexpr):
    """Write rows ``first + rows`` below ``limit`` and their first D columns."""
    stride = stride * ALIGNMENT
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    mask = rows[:, None] < limit - first
    if D != PADDED:
        mask = mask & (dims[None, :] < D)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def head_base(pointer, stride_b, stride_h, b, h):
    """First element of one head, by 64-bit offsets."""
    offset = tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
    return pointer + offset * ALIGNMENT


@triton.jit
def margin(scores, scale, reference, offset, inverse, EXACT: tl.constexpr):
    """Scaled scores less the row's threshold, in units of the row's normaliser.

    EXACT keeps the digits that a threshold of 1e4 would lose, by subtracting the row maximum first; elsewhere scale
    and reference already contain the offset and the normaliser.
    """
    if EXACT:
        return ((scores * scale - reference) - offset) * inverse
    else:
        return scores * scale - reference


@triton.jit
def tile_scores(
    q, K, stride, first, limit, cols, dims, start, end, position, slope, negative, fix,
    D: tl.constexpr, PADDED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one tile; where ``fix`` with the sign of the row's factor, the ALiBi term, and masked. # [BM, BN]

    The sign waits until here: queries that had it would be an operand from registers, and products of those wait for
    one another.
    """
    k = load_tile(K, stride, first, limit, cols, dims, D, PADDED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if fix:
        if HAS_SCALE:
            scores = tl.where(negative[:, None], -scores, scores)
        keys = first + cols
        if HAS_SLOPES:
            scores = scores - slope[:, None] * distance(position, keys)
        scores = mask_invisible(scores, keys, start, end)
    return scores


@triton.jit
def query_factor(QUERY_SCALE, b, h, q_heads, first, q_len, row, scale, HAS_SCALE: tl.constexpr):
    """Absolute value of the factor of a query's scores, kept from 0, and whether the factor is negative. # [BM]"""
    factor = tl.zeros_like(row).to(tl.float32) + scale
    if HAS_SCALE:
        rows = tl.cast(b * q_heads + h, tl.int64) * q_len + first + row
        factor *= tl.load(QUERY_SCALE + rows, mask=row < q_len - first, other=0.0).to(tl.float32)
    return tl.maximum(tl.abs(factor), 1.0e-25), factor < 0


@triton.jit
def load_query(
    Q, QUERY_SCALE, stride_b, stride_h, stride_n, b, h, q_heads, first, q_len, row, dims, scale,
    D: tl.constexpr, PADDED: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """A tile of queries, the factor of their scores without its sign, and whether the factor is negative.

    A positive factor commutes with the row maximum.
    """
    q = load_tile(head_base(Q, stride_b, stride_h, b, h), stride_n, first, q_len, row, dims, D, PADDED)
    factor, negative = query_factor(QUERY_SCALE, b, h, q_heads, first, q_len, row, scale, HAS_SCALE)
    return q, factor, negative
