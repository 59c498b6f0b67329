"""Backward over listed tiles only: dQ by rows of the list, dK and dV by its transpose. Deterministic, no atomics.

With the row's normalised scale and threshold tau stored by the forward, ``x = max(q.k * scale - tau, 0)``,
``p = x^beta`` and ``u = x^(beta - 1)`` need no further normalisation, and

    dz = inverse * u * (dP - delta),  delta = sum(u dP) / sum(u) = dO . mean,  dV = p^T dO,

where ``mean`` is the mean of the values under u. For softmax, ``p = u = exp2(q.k * scale - tau)``.
"""

import triton
import triton.language as tl

from .launch import Launched
from .threshold import SOFTMAX, positive_part, powers
from .tiles import (
    ALIGNMENT,
    distance,
    head_base,
    load_rows,
    load_tile,
    margin,
    positions_of,
    schedule,
    store_tile,
)


@triton.jit
def weights(x, beta, KIND: tl.constexpr):
    """Probabilities and the diagonal of their Jacobian from scores less the threshold (its positive part)."""
    if KIND == SOFTMAX:
        p = tl.exp2(x)
        return p, p
    else:
        return powers(x, beta, KIND)


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
        "stride_vn", "stride_gb", "stride_gh", "stride_gn", "stride_range", "stride_position", "batch", "q_heads",
        "group", "q_len", "k_len", "q_tiles", "k_tiles", "heads_at_once",
    ]
)  # fmt: skip
def query_gradient_kernel(
    Q, K, V, GRAD, MEAN, SLOPES, KEY_START, KEY_END, QUERY_POSITIONS,
    ROW_SCALE, ROW_REFERENCE, ROW_OFFSET, INVERSE, LIST, COUNT, VECTORS, GRAD_Q, GRAD_SCALE, GRAD_SLOPE,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    stride_range, stride_position, batch, q_heads, group, q_len, k_len, q_tiles, k_tiles, heads_at_once,
    scaling, unit, beta,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    SCALE_GRADIENT: tl.constexpr, SLOPE_GRADIENT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ROW_VECTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ, VECTORS and, where asked, the gradient of the query scale and of the slopes (per row, summed by the host).

    Grid: (q_tiles * batch * q_heads,). ``unit`` is the factor between z and the units of ROW_SCALE. VECTORS are the
    ROW_VECTORS numbers that dK and dV need of each row (see :func:`key_value_gradient_kernel`), tile by tile.
    """
    # The positive part at once, where no slope is subtracted later.
    EARLY: tl.constexpr = KIND != SOFTMAX and not HAS_SLOPES
    LATE: tl.constexpr = KIND != SOFTMAX and HAS_SLOPES
    hidden: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
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
    inside = rows < q_len
    row_index = tl.cast(bh, tl.int64) * q_len + rows
    range_base = tl.cast(b, tl.int64) * stride_range
    start = tl.load(KEY_START + range_base + rows, mask=inside, other=0)
    end = tl.minimum(tl.load(KEY_END + range_base + rows, mask=inside, other=0), k_len)
    position = positions_of(QUERY_POSITIONS, tl.cast(b, tl.int64) * stride_position, rows, q_len, k_len, HAS_POSITIONS)
    q = load_tile(head_base(Q, stride_qb, stride_qh, b, h), stride_qn, q_tile * BM, q_len, row, dims, D, DP)
    grad = load_tile(head_base(GRAD, stride_gb, stride_gh, b, h), stride_gn, q_tile * BM, q_len, row, dims_v, DV, DVP)
    mean_base = MEAN + (tl.cast(b, tl.int64) * q_len * q_heads + h) * DV
    mean = load_tile(mean_base, q_heads * (DV // ALIGNMENT), q_tile * BM, q_len, row, dims_v, DV, DVP)
    delta = tl.sum(grad.to(tl.float32) * mean.to(tl.float32), 1)
    tile_index = tl.cast(bh, tl.int64) * q_tiles + q_tile
    slot = tile_index * BM + row
    c = tl.load(ROW_SCALE + slot)
    reference = tl.load(ROW_REFERENCE + slot)
    offset = tl.load(ROW_OFFSET + slot)
    inverse = tl.load(INVERSE + slot)
    vectors = VECTORS + tile_index * (ROW_VECTORS * BM)
    scaled_delta = delta * (c * inverse if EXACT else c)
    quads = tl.reshape(tl.join(tl.join(c, c), tl.join(reference, scaled_delta)), [BM, 4])
    tl.store(vectors + (4 * row[:, None] + tl.arange(0, 4)[None, :]), quads)
    ends = tl.join(start, end).to(tl.float32, bitcast=True)
    tl.store(vectors + (4 * BM + 2 * row[:, None] + tl.arange(0, 2)[None, :]), ends)
    if ROW_VECTORS > 6:
        tl.store(vectors + (6 * BM + row), inverse)
    if ROW_VECTORS > 7:
        tl.store(vectors + (7 * BM + row), offset)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(SLOPES + h).to(tl.float32) * unit
    row_slope = slope * inverse

    grad_q = tl.zeros([BM, DP], tl.float32)
    moment = tl.zeros([BM], tl.float32)
    excess = moment
    weight = moment
    reach = moment
    LIST += tile_index * k_tiles
    count = tl.load(COUNT + tile_index)
    for i in tl.range(0, count * PARTS, num_stages=STAGES):
        entry = tl.load(LIST + i // PARTS).to(tl.int32)
        first = (entry >> 1) * (PARTS * BN) + (i % PARTS) * BN
        fix = (entry & 1) != 0
        if HAS_SLOPES:
            fix = fix | (slope != 0)
        k = load_tile(K, stride_kn, first, k_len, cols, dims, D, DP)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x = margin(scores, c[:, None], reference[:, None], offset[:, None], inverse[:, None], EXACT)
        if EARLY:
            x = positive_part(x)
        keys = first + cols
        if HAS_SLOPES:
            # Outside the branch below: a value used in it and after it is hoisted wrongly by Triton 3.6.
            far = distance(position, keys)
        if fix:
            if HAS_SLOPES:
                x = x - row_slope[:, None] * far
            visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
            x = tl.where(visible, x, hidden)
        if LATE:
            x = positive_part(x)
        v = load_tile(V, stride_vn, first, k_len, cols, dims_v, DV, DVP)
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        _, u = weights(x, beta, KIND)
        grad_y = u * (grad_p - delta[:, None])
        if SLOPE_GRADIENT:
            moment += tl.sum(grad_y * far, 1)
            excess += tl.sum(grad_y, 1)
            weight += tl.sum(u, 1)
            reach += tl.sum(u * far, 1)
        grad_q = tl.dot(grad_y.to(k.dtype), k, grad_q, input_precision=PRECISION)

    if SCALE_GRADIENT:
        along = tl.sum(q.to(tl.float32) * grad_q, 1) * scaling * inverse
        tl.store(GRAD_SCALE + row_index, along, mask=inside)
    if SLOPE_GRADIENT:
        # Gradients of a row's scores add up to 0; what they miss it by is delta's error, of the rounded mean.
        moment -= excess / tl.where(weight > 0, weight, 1.0) * reach
        tl.store(GRAD_SLOPE + row_index, -moment * inverse, mask=inside)
    grad_base = GRAD_Q + (tl.cast(b, tl.int64) * q_len * q_heads + h) * D
    store_tile(
        grad_base, q_heads * (D // ALIGNMENT), q_tile * BM, q_len, row, dims, grad_q * (c / unit)[:, None], D, DP
    )


@Launched
@triton.jit(do_not_specialize=["q_tiles", "k_tiles"])
def transpose_list_kernel(FLAGS, LIST, COUNT, q_tiles, k_tiles, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Query tiles of each key tile, ascending, from the flags. Grid: (ceil(k_tiles / COLS), batch * q_heads)."""
    bh = tl.cast(tl.program_id(1), tl.int64)
    key_tile = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = key_tile < k_tiles
    count = tl.zeros([COLS], tl.int32)
    lists = LIST + (bh * k_tiles + key_tile) * q_tiles
    for first in range(0, q_tiles, ROWS):
        query_tile = first + tl.arange(0, ROWS)
        pointers = FLAGS + (bh * q_tiles + query_tile[:, None]) * k_tiles + key_tile[None, :]
        mask = (query_tile[:, None] < q_tiles) & inside[None, :]
        flag = tl.load(pointers, mask=mask, other=0).to(tl.int32)
        listed = (flag > 0).to(tl.int32)
        slot = count[None, :] + tl.cumsum(listed, 0) - 1
        entry = 2 * query_tile[:, None] + (flag == 2).to(tl.int32)
        tl.store(lists[None, :] + slot, entry.to(LIST.dtype.element_ty), mask=listed > 0)
        count += tl.sum(listed, 0)
    tl.store(COUNT + bh * k_tiles + key_tile, count, mask=inside)


@Launched
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
        "stride_vn", "stride_gb", "stride_gh", "stride_gn", "stride_position", "batch", "q_heads",
        "group", "q_len", "k_len", "q_tiles", "k_tiles",
    ]
)  # fmt: skip
def key_value_gradient_kernel(
    Q, K, V, GRAD, SLOPES, QUERY_POSITIONS, VECTORS, LIST, COUNT, GRAD_K, GRAD_V,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    stride_position, batch, q_heads, group, q_len, k_len, q_tiles, k_tiles,
    unit, beta,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    TILE_M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, ROW_VECTORS: tl.constexpr,
    STAGES: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of BN keys, summed over the query heads of its group in a fixed order.

    Grid: (ceil(k_len / BN) * batch * key_heads,). A listed tile has TILE_M queries, read BM at a time, and PARTS * BN
    keys. VECTORS hold for each tile: (scale, reference, scale, delta times the scale of dz) of each row, (start, end)
    of its visible keys (int32 as bits), then normalisers (with slopes or EXACT) and offsets (EXACT). They are read in
    pairs where they are used, the scale twice: held through an iteration each would take 16 registers. NEAR: a head
    of Q or GRAD spans less than 2^31 elements, and so do its VECTORS.
    """
    # The positive part at once, where no slope is subtracted later.
    EARLY: tl.constexpr = KIND != SOFTMAX and not HAS_SLOPES
    LATE: tl.constexpr = KIND != SOFTMAX and HAS_SLOPES
    hidden: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    k_heads = q_heads // group
    pid = tl.program_id(0)
    key_block = pid // (batch * k_heads)
    k_tile = key_block // PARTS
    bh = pid % (batch * k_heads)
    b = bh // k_heads
    k_head = bh % k_heads
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DP)
    dims_v = tl.arange(0, DVP)
    first = key_block * BN
    keys = first + cols
    row = tl.arange(0, BM)
    pair = 4 * row[:, None] + tl.arange(0, 2)[None, :]
    row_parts: tl.constexpr = TILE_M // BM
    k = load_tile(head_base(K, stride_kb, stride_kh, b, k_head), stride_kn, first, k_len, cols, dims, D, DP)
    v = load_tile(head_base(V, stride_vb, stride_vh, b, k_head), stride_vn, first, k_len, cols, dims_v, DV, DVP)
    position_base = tl.cast(b, tl.int64) * stride_position
    grad_k = tl.zeros([BN, DP], tl.float32)
    grad_v = tl.zeros([BN, DVP], tl.float32)

    for member in range(0, group):
        h = k_head * group + member
        q_bh = tl.cast(b * q_heads + h, tl.int64)
        queries = head_base(Q, stride_qb, stride_qh, b, h)
        grads = head_base(GRAD, stride_gb, stride_gh, b, h)
        slope = 0.0
        if HAS_SLOPES:
            slope = tl.load(SLOPES + h).to(tl.float32) * unit
        entries = LIST + (q_bh * k_tiles + k_tile) * q_tiles
        vectors = VECTORS + q_bh * q_tiles * (ROW_VECTORS * TILE_M)
        count = tl.load(COUNT + q_bh * k_tiles + k_tile)
        for i in tl.range(0, count * row_parts, num_stages=STAGES):
            entry = tl.load(entries + i // row_parts).to(tl.int32)
            tile = entry >> 1
            part = i & (row_parts - 1)
            first_row = tile * TILE_M + part * BM
            # A row past the last has a threshold that no score exceeds.
            q = load_rows(queries, stride_qn, first_row + row, q_len, dims, D, DP, NEAR)
            grad = load_rows(grads, stride_gn, first_row + row, q_len, dims_v, DV, DVP, NEAR)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            of_rows = vectors + ((tile if NEAR else tile.to(tl.int64)) * (ROW_VECTORS * TILE_M) + part * (4 * BM))
            c, reference = tl.split(tl.load(of_rows + pair))
            inverse = c
            offset = c
            if EXACT:
                of_others = of_rows + (6 * TILE_M - part * (3 * BM) + row)
                inverse = tl.load(of_others)
                offset = tl.load(of_others + TILE_M)
            x = margin(scores, c[None, :], reference[None, :], offset[None, :], inverse[None, :], EXACT)
            if EARLY:
                x = positive_part(x)
            fix = (entry & 1) != 0
            if HAS_SLOPES:
                fix = fix | (slope != 0)
            if fix:
                # From the entry and i again: what the loads above compute would stay in registers for their stages.
                again = (entry & -2).to(tl.int64) * (ROW_VECTORS * TILE_M // 2)
                in_tile = (i % row_parts) * BM
                if HAS_SLOPES:
                    rows = first_row + row
                    position = positions_of(QUERY_POSITIONS, position_base, rows, q_len, k_len, HAS_POSITIONS)
                    row_slope = slope * tl.load(vectors + (again + 6 * TILE_M + in_tile) + row)
                    x = x - row_slope[None, :] * tl.abs(position[None, :] - keys[:, None].to(tl.float32))
                of_ends = vectors + (4 * TILE_M + (again + 2 * in_tile))
                ends = tl.load(of_ends.to(tl.pointer_type(tl.int64)) + row)
                start = ends.to(tl.int32)
                end = (ends >> 32).to(tl.int32)
                visible = (keys[:, None] >= start[None, :]) & (keys[:, None] < end[None, :])
                x = tl.where(visible, x, hidden)
            if LATE:
                x = positive_part(x)
            p, u = weights(x, beta, KIND)
            grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
            c, delta = tl.split(tl.load(of_rows + (2 + pair)))
            if EXACT:
                c *= inverse
            grad_y = u * (grad_p * c[None, :] - delta[None, :])
            grad_k = tl.dot(grad_y.to(q.dtype), q, grad_k, input_precision=PRECISION)

    base_k = GRAD_K + (tl.cast(b, tl.int64) * k_len * k_heads + k_head) * D
    store_tile(base_k, k_heads * (D // ALIGNMENT), first, k_len, cols, dims, grad_k / unit, D, DP)
    base_v = GRAD_V + (tl.cast(b, tl.int64) * k_len * k_heads + k_head) * DV
    store_tile(base_v, k_heads * (DV // ALIGNMENT), first, k_len, cols, dims_v, grad_v, DV, DVP)
