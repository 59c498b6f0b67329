"""Tile shapes, warps and pipeline depth by head dimension and dtype: a fixed table, nothing is tuned at run time."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# Scores of a decoded row that one program treats at once.
DECODE_SCORES = 64 if INTERPRETED else 16384


class Launch(NamedTuple):
    """How one kernel runs: keys of a tile it treats at once, warps, pipeline stages, limit of registers per thread."""

    columns: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self, tile_columns: int | None = None) -> dict[str, Any]:
        """Keyword arguments of the launch; with ``tile_columns`` also how many parts a listed tile is treated in."""
        limit = {} if self.registers is None or INTERPRETED else {"maxnreg": self.registers}
        parts = {} if tile_columns is None else {"PARTS": tile_columns // self.columns}
        return {"BN": self.columns, "STAGES": self.stages, "num_warps": self.warps, **parts, **limit}


class Tiling(NamedTuple):
    """One list serves all kernels: an entry is a tile of ``rows`` queries and ``columns`` keys.

    The gradient of keys and values reads such a tile ``key_rows`` queries at a time. Where all keys are no more than
    twice the columns of ``short``, one kernel computes the forward, ``short_rows`` queries in a program.
    """

    rows: int
    columns: int
    key_rows: int
    sweep: Launch
    solve: Launch
    output: Launch
    query: Launch
    key: Launch
    short_rows: int = 0
    # Without columns: never.
    short: Launch = Launch(0, 4, 1)


def padded(head_dim: int) -> int:
    """Power of two that holds a head dimension."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiling(head_dim: int, dtype: torch.dtype) -> Tiling:
    """Parameters for the larger of the query's and the value's head dimension."""
    return _tiling(int(padded(head_dim)), dtype)


@functools.cache
def _tiling(size: int, dtype: torch.dtype) -> Tiling:
    if INTERPRETED:
        return Tiling(32, 32, 16, Launch(32, 4, 1), *[Launch(16, 4, 1)] * 4, 16, Launch(32, 4, 1))
    if dtype == torch.float32:
        if size > 128:
            return Tiling(32, 32, 32, *[Launch(32, 8, 1)] * 5)
        warps = 4 if size <= 64 else 8
        wide, narrow = Launch(64, warps, 1), Launch(32, warps, 1)
        return Tiling(64, 64, 32, wide, wide, narrow, narrow, wide)
    if size <= 64:
        sweep, solve, output = Launch(128, 8, 3, 128), Launch(128, 8, 3, 128), Launch(128, 8, 3)
        query, key = Launch(64, 8, 4, 128), Launch(64, 4, 3, 168)
        return Tiling(128, 128, 64, sweep, solve, output, query, key, 64, Launch(128, 4, 1))
    if size <= 128:
        sweep, solve, output = Launch(128, 8, 2, 128), Launch(128, 8, 2), Launch(64, 8, 3)
        query, key = Launch(64, 8, 3), Launch(128, 8, 3)
        return Tiling(128, 128, 64, sweep, solve, output, query, key, 128, Launch(128, 8, 1))
    score, other = Launch(64, 4, 2), Launch(64, 8, 1)
    return Tiling(64, 64, 32, score, score, Launch(64, 8, 2), other, other)


def decode_launch(head_dim: int, dtype: torch.dtype) -> Launch:
    """Launch of the decoding kernels."""
    if INTERPRETED:
        return Launch(16, 4, 1)
    wide = padded(head_dim) * dtype.itemsize > 256
    return Launch(64, 4, 2 if wide else 4)
