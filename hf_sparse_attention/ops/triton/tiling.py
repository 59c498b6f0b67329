"""Tile shapes, warps and pipeline depth by head dimension and dtype: a fixed table, nothing is tuned at run time."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Launch(NamedTuple):
    """Rows and columns of a tile, warps of a program, and stages of its software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


class Tiling(NamedTuple):
    """One list of tiles serves all kernels: ``forward.rows`` x ``forward.columns`` scores an entry.

    ``query`` has the same tile; ``key`` the same columns, and rows that divide the tile's.
    """

    forward: Launch
    query: Launch
    key: Launch


def padded(head_dim: int) -> int:
    """Power of two that holds a head dimension."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiling(head_dim: int, dtype: torch.dtype) -> Tiling:
    """Launch parameters for the larger of the query's and the value's head dimension."""
    if INTERPRETED:
        return Tiling(Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 16, 4, 1))
    size = padded(head_dim)
    if dtype == torch.float32:
        rows = 64 if size <= 128 else 32
        return Tiling(Launch(rows, 32, 8, 1), Launch(rows, 32, 8, 1), Launch(32, 32, 8, 1))
    if size <= 64:
        return Tiling(Launch(128, 128, 8, 3), Launch(128, 128, 8, 2), Launch(64, 128, 8, 2))
    if size <= 128:
        return Tiling(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 64, 8, 2))
    return Tiling(Launch(64, 64, 8, 2), Launch(64, 64, 8, 1), Launch(32, 64, 8, 1))
