"""How the chunked path cuts attention into tiles: queries of some heads, against the keys that any of them sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Scores in a tile: on a CPU each thread's share stays in its cache, elsewhere a tile keeps the device busy.
_CPU_TILE_SCORES, _TILE_SCORES = 2**19, 2**24
# Queries in a tile: few waste little above the causal diagonal, many make better matrix products.
_CPU_TILE_QUERIES, _TILE_QUERIES, _MIN_TILE_QUERIES = 64, 512, 16


class Tile(NamedTuple):
    """Slices of the batch, the key heads, the queries and the keys.

    Keys before ``seen_from`` or from ``seen_until`` on are outside the range of some query of the tile.
    """

    batch: slice
    heads: slice
    queries: slice
    keys: slice
    seen_from: int
    seen_until: int


class _Bounds(NamedTuple):
    """Smallest and largest key range bounds of one batch entry's chunk of queries."""

    start_min: int
    start_max: int
    end_min: int
    end_max: int


def plan_tiles(
    query: Tensor, key: Tensor, key_start: Tensor | None, key_end: Tensor | None, threads: int
) -> Iterator[Tile]:
    """Tiles, for so many CPU threads, that cover every pair of a query and a key in its range once.

    A tile has several batch entries only with all of their heads, so that its heads are neighbours in memory.
    """
    batch, query_heads, query_length, _ = query.shape
    key_heads, key_length = key.shape[1], key.shape[2]
    if query.numel() == 0 or key_length == 0:
        return
    on_cpu = query.device.type == "cpu"
    budget = _CPU_TILE_SCORES * threads if on_cpu else _TILE_SCORES
    group = query_heads // key_heads
    rows = max(_MIN_TILE_QUERIES, budget // (group * key_length))
    rows = min(rows, query_length, _CPU_TILE_QUERIES if on_cpu else _TILE_QUERIES)
    starts, ends = _extremes(key_start, rows), _extremes(key_end, rows)

    for chunk, first in enumerate(range(0, query_length, rows)):
        bounds = [
            _Bounds(
                *(starts[b % len(starts)][chunk] if starts else (0, 0)),
                *(ends[b % len(ends)][chunk] if ends else (key_length, key_length)),
            )
            for b in range(batch)
        ]
        queries = slice(first, min(first + rows, query_length))
        width = max(1, max(bound.end_max for bound in bounds) - min(bound.start_min for bound in bounds))
        head_scores = group * (queries.stop - first) * width
        heads = min(key_heads, max(1, budget // head_scores))
        entries = max(1, budget // (key_heads * head_scores))
        for b in range(0, batch, entries):
            inside = bounds[b : b + entries]
            keys = slice(min(bound.start_min for bound in inside), max(bound.end_max for bound in inside))
            if keys.start >= keys.stop:
                continue
            seen_from, seen_until = max(bound.start_max for bound in inside), min(bound.end_min for bound in inside)
            for h in range(0, key_heads, heads):
                head_slice = slice(h, min(h + heads, key_heads))
                yield Tile(slice(b, b + len(inside)), head_slice, queries, keys, seen_from, seen_until)


def _extremes(bounds: Tensor | None, rows: int) -> list[list[list[int]]]:
    """[B or 1][chunk] pairs: the smallest and the largest bound of each chunk of ``rows`` queries."""
    if bounds is None:
        return []
    missing = -bounds.shape[1] % rows
    padded = torch.cat([bounds, bounds[:, -1:].expand(-1, missing)], dim=1) if missing else bounds
    chunks = padded.unflatten(1, (-1, rows))
    return torch.stack([chunks.amin(-1), chunks.amax(-1)], dim=-1).tolist()
