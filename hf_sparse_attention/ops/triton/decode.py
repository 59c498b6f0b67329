"""A few queries against a long cache: keys are read once, values only where a weight is positive.

Three kernels, split over the keys. Scores go to memory (4 bytes a key and query) with the maximum of every block of
them; the threshold is solved there; the last kernel skips blocks of values in which no query has a weight.
"""

import triton
import triton.language as tl

from .launch import Launched
from .solve import MAX_PASSES
from .threshold import (
    NOTHING,
    SOFTMAX,
    UNREACHABLE,
    converged,
    curvature,
    curvature_flatness,
    highest_offset,
    powers,
    solve_step,
)
from .tiles import ALIGNMENT, distance, head_base, load_tile, mask_invisible

# Block maxima of a split, and of a row, that are compared at once.
BLOCKS_AT_ONCE = tl.constexpr(32)
CHUNK = tl.constexpr(256)


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_range",
        "stride_position", "q_heads", "group", "q_len", "k_len", "blocks", "blocks_per_split",
    ]
)  # fmt: skip
def decode_scores_kernel(
    Q, K, QUERY_SCALE, SLOPES, KEY_START, KEY_END, QUERY_POSITIONS, SCORES, BLOCK_MAX,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_range, stride_position,
    q_heads, group, q_len, k_len, blocks, blocks_per_split, scale, unit,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores in units of the threshold, -inf where invisible, and their maximum by block of BN keys.

    Grid: (splits, batch * key_heads). A row is one query of one head of the group: ``member * q_len + query``.
    SCORES is (batch * key_heads, group * q_len, blocks * BN), BLOCK_MAX (batch * key_heads, group * q_len, blocks).
    """
    split = tl.program_id(0)
    bh = tl.program_id(1)
    k_heads = q_heads // group
    b = bh // k_heads
    row = tl.arange(0, ROWS)
    inside = row < group * q_len
    head = (bh % k_heads) * group + row // q_len
    query = row % q_len
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DP)
    offsets = (
        tl.cast(b, tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qn
    ) * ALIGNMENT
    mask = inside[:, None] & (dims[None, :] < D)
    q = tl.load(Q + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    c = tl.zeros([ROWS], tl.float32) + scale
    if HAS_SCALE:
        index = (tl.cast(b, tl.int64) * q_heads + head) * q_len + query
        c *= tl.load(QUERY_SCALE + index, mask=inside, other=0.0).to(tl.float32)
    start = tl.load(KEY_START + tl.cast(b, tl.int64) * stride_range + query, mask=inside, other=0)
    end = tl.load(KEY_END + tl.cast(b, tl.int64) * stride_range + query, mask=inside, other=0)
    end = tl.minimum(end, k_len)
    if HAS_SLOPES:
        slope = tl.load(SLOPES + head, mask=inside, other=0.0).to(tl.float32) * unit
        if HAS_POSITIONS:
            base = tl.cast(b, tl.int64) * stride_position
            position = tl.load(QUERY_POSITIONS + base + query, mask=inside, other=0).to(tl.float32)
        else:
            position = (query + (k_len - q_len)).to(tl.float32)
    live = end > start
    lo = tl.min(tl.where(live, start, k_len), 0)
    hi = tl.max(tl.where(live, end, 0), 0)

    keys_of_head = head_base(K, stride_kb, stride_kh, b, bh % k_heads)
    rows_total = group * q_len
    first_row = tl.cast(bh, tl.int64) * rows_total + row
    for i in tl.range(0, blocks_per_split, num_stages=STAGES):
        block = split * blocks_per_split + i
        first = block * BN
        keys = first + cols
        # Blocks that no query sees read nothing, and say so.
        k = load_tile(keys_of_head, stride_kn, first, tl.where(first + BN > lo, hi, 0), cols, dims, D, DP)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * c[:, None]
        if HAS_SLOPES:
            s -= slope[:, None] * distance(position, keys)
        s = mask_invisible(s, keys, start, end)
        write = row < tl.where(block < blocks, rows_total, 0)
        pointers = SCORES + first_row[:, None] * (blocks * BN) + keys[None, :]
        tl.store(pointers, s, mask=write[:, None])
        tl.store(BLOCK_MAX + first_row * blocks + block, tl.max(s, 1), mask=write)


@triton.jit
def listed_scores(SCORES, LIST, first, count, slots, BN: tl.constexpr):
    """Scores of the listed blocks from ``first`` on, -inf past the end of the list. # [slots]"""
    entry = first + slots // BN
    block = tl.load(LIST + entry, mask=entry < count, other=0)
    return tl.load(SCORES + block.to(tl.int64) * BN + slots % BN, mask=entry < count, other=float("-inf"))


@Launched
@triton.jit(do_not_specialize=["blocks"])
def decode_threshold_kernel(
    SCORES, BLOCK_MAX, REFERENCE, OFFSET, LIST, blocks, beta, tolerance,
    KIND: tl.constexpr, BN: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Maximum of one row of scores, and its threshold relative to it. Grid: (rows,).

    Only blocks whose maximum exceeds the row's less 1 can hold support; LIST (rows, blocks) keeps them. For softmax
    the threshold is minus infinity and needs no scores.
    """
    index = tl.cast(tl.program_id(0), tl.int64)
    BLOCK_MAX += index * blocks
    LIST += index * blocks
    SCORES += index * blocks * BN
    one = tl.zeros([1], tl.float32)
    m = one + NOTHING
    for first in range(0, blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        m = tl.maximum(m, tl.max(tl.load(BLOCK_MAX + block, mask=block < blocks, other=float("-inf")), 0))
    t = tl.where(m > NOTHING, -1.0, UNREACHABLE)
    if KIND == SOFTMAX:
        t = tl.where(m > NOTHING, NOTHING, UNREACHABLE)
    else:
        count = 0
        for first in range(0, blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            best = tl.load(BLOCK_MAX + block, mask=block < blocks, other=float("-inf"))
            keep = (best > m - 1.0).to(tl.int32)
            tl.store(LIST + count + tl.cumsum(keep, 0) - 1, block, mask=keep > 0)
            count += tl.sum(keep, 0)
        tl.debug_barrier()
        slots = tl.arange(0, AT_ONCE * BN)
        lo_t = t
        hi_t = highest_offset(m)
        top = hi_t
        unsolved = count
        passes = 0
        while (unsolved > 0) & (passes < MAX_PASSES):
            f = one
            d = one
            c = one
            for first in range(0, count, AT_ONCE):
                x = tl.maximum((listed_scores(SCORES, LIST, first, count, slots, BN) - m) - t, 0.0)
                p, u = powers(x, beta, KIND)
                f += tl.sum(p, 0)
                d += tl.sum(u, 0)
                c += tl.sum(curvature(x, beta, KIND), 0)
            flatness = curvature_flatness(f, d, c, beta)
            t_new, lo_t, hi_t = solve_step(t, lo_t, hi_t, f, d, flatness, beta, KIND)
            t_new = tl.minimum(t_new, top)
            open_row = (~converged(f, flatness, 1.0, beta, tolerance, KIND)) & (t_new != t)
            unsolved = tl.max(open_row.to(tl.int32), 0)
            t = t_new
            passes += 1
    tl.store(REFERENCE + index + tl.arange(0, 1), tl.where(m > NOTHING, m, 0.0))
    tl.store(OFFSET + index + tl.arange(0, 1), t)


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_vb", "stride_vh", "stride_vn", "k_heads", "rows", "k_len", "blocks", "blocks_per_split", "splits",
    ]
)  # fmt: skip
def decode_output_kernel(
    V, SCORES, BLOCK_MAX, REFERENCE, OFFSET, LIST, PARTIAL, TOTAL,
    stride_vb, stride_vh, stride_vn, k_heads, rows, k_len, blocks, blocks_per_split, splits, beta,
    KIND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of weighted values and of weights over one split of the keys, for the rows of one key head.

    Grid: (splits, batch * key_heads). PARTIAL is (batch * key_heads, rows, splits, DV), TOTAL the same without DV.
    LIST (batch * key_heads, blocks) receives the blocks in which some row has a weight.
    """
    split = tl.program_id(0)
    bh = tl.program_id(1)
    row = tl.arange(0, ROWS)
    inside = row < rows
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DVP)
    first_row = tl.cast(bh, tl.int64) * rows + row
    reference = tl.load(REFERENCE + first_row, mask=inside, other=0.0)
    offset = tl.load(OFFSET + first_row, mask=inside, other=UNREACHABLE)
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, blocks)

    LIST += tl.cast(bh, tl.int64) * blocks + begin
    count = 0
    for first in range(begin, end, BLOCKS_AT_ONCE):
        block = first + tl.arange(0, BLOCKS_AT_ONCE)
        mask = inside[:, None] & (block < end)[None, :]
        best = tl.load(BLOCK_MAX + first_row[:, None] * blocks + block[None, :], mask=mask, other=float("-inf"))
        keep = tl.max(((best - reference[:, None]) > offset[:, None]).to(tl.int32), 0)
        tl.store(LIST + count + tl.cumsum(keep, 0) - 1, block, mask=keep > 0)
        count += tl.sum(keep, 0)
    tl.debug_barrier()

    values = head_base(V, stride_vb, stride_vh, bh // k_heads, bh % k_heads)
    narrow = tl.where(offset < 0, -1.0 / offset, 1.0)
    out = tl.zeros([ROWS, DVP], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        first = tl.load(LIST + i) * BN
        pointers = SCORES + first_row[:, None] * (blocks * BN) + (first + cols)[None, :]
        s = tl.load(pointers, mask=inside[:, None], other=float("-inf")) - reference[:, None]
        if KIND == SOFTMAX:
            p = tl.where(offset[:, None] < 0, tl.exp2(s), 0.0)
        else:
            p, _ = powers(tl.maximum(s - offset[:, None], 0.0) * narrow[:, None], beta, KIND)
        total += tl.sum(p, 1)
        v = load_tile(values, stride_vn, first, k_len, cols, dims, DV, DVP)
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
    slot = first_row * splits + split
    tl.store(TOTAL + slot, total, mask=inside)
    mask = inside[:, None] & (dims[None, :] < DV)
    tl.store(PARTIAL + slot[:, None] * DV + dims[None, :], out, mask=mask)


@Launched
@triton.jit(do_not_specialize=["q_heads", "group", "q_len", "k_len", "splits", "stride_range"])
def decode_combine_kernel(
    PARTIAL, TOTAL, KEY_START, KEY_END, OUT, q_heads, group, q_len, k_len, splits, stride_range,
    DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sum the splits and normalise. Grid: (batch * key_heads * rows,); OUT is (batch, q_len, q_heads, DV)."""
    index = tl.cast(tl.program_id(0), tl.int64)
    rows = group * q_len
    bh = index // rows
    k_heads = q_heads // group
    b = bh // k_heads
    query = index % q_len
    head = (bh % k_heads) * group + (index % rows) // q_len
    dims = tl.arange(0, DVP)
    out = tl.zeros([DVP], tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        total += tl.sum(tl.load(TOTAL + index * splits + split, mask=split < splits, other=0.0), 0)
        mask = (split < splits)[:, None] & (dims < DV)[None, :]
        pointers = PARTIAL + (index * splits + split)[:, None] * DV + dims[None, :]
        out += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
    start = tl.maximum(tl.load(KEY_START + b * stride_range + query), 0)
    end = tl.minimum(tl.load(KEY_END + b * stride_range + query), k_len)
    # A query that sees keys but found no score has NaN inputs, and says so; one that sees none gives zeros.
    empty = tl.where(end > start, float("nan"), 0.0)
    out = tl.where(total > 0, out / tl.where(total > 0, total, 1.0), empty)
    pointers = OUT + ((b * q_len + query) * q_heads + head) * DV + dims
    tl.store(pointers, out.to(OUT.dtype.element_ty), mask=dims < DV)
