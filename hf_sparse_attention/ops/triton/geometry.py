"""Sizes, strides and layouts that the launches share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import multiplies_in_tf32
from .tiles import ALIGNMENT
from .tiling import Tiling

_ALIGNMENT = ALIGNMENT.value
# Keys and values of the heads in flight should fit in the L2 cache beside everything else.
_L2_BYTES = 24 * 2**20
# Heads that span fewer elements than this are addressed by 32-bit offsets from their first.
_NEAR = 2**31


def ceil_div(number: int, size: int) -> int:
    """``triton.cdiv``, which takes the host 3 microseconds."""
    return -(-number // size)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself when kernels can read it by 16 bytes, else a contiguous copy."""
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride())]
    batch, heads, row, _ = strides
    # A power of two divides all of them if it divides their bits together; offsets within a tile of rows are 32-bit.
    readable = (batch | heads | row) % _ALIGNMENT == 0 and row < 2**22 and tensor.data_ptr() % 16 == 0
    return tensor if readable and tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def tokens_first(like: Tensor, length: int, heads: int, dim: int) -> Tensor:
    """Uninitialised (B, heads, length, dim) stored as (B, length, heads, dim), the layout of a projection."""
    size, strides = (like.shape[0], heads, length, dim), (length * heads * dim, dim, heads * dim, 1)
    return like.new_empty_strided(size, strides)


def near(tensors: tuple[Tensor, ...], numbers_per_head: int) -> bool:
    """Whether every head of the tensors (B, H, N, D), and as many numbers, can be addressed by 32-bit offsets."""
    extents = [(tensor.shape[2] - 1) * tensor.stride(2) + tensor.shape[3] for tensor in tensors]
    return max(numbers_per_head, *extents) < _NEAR


def list_dtype(q_tiles: int, k_tiles: int) -> torch.dtype:
    # An entry is twice a tile index plus one bit.
    return torch.int16 if max(q_tiles, k_tiles) <= 2**14 else torch.int32


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride // _ALIGNMENT for tensor in tensors for stride in tensor.stride()[:3]]


class Geometry:
    """Sizes, strides and compile-time parameters shared by the launches of one call."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, tiles: Tiling) -> None:
        self.batch, self.q_heads, self.q_len, self.dim = query.shape
        self.k_heads, self.k_len, self.value_dim = key.shape[1], key.shape[2], value.shape[3]
        self.group = self.q_heads // self.k_heads
        self.q_tiles = ceil_div(self.q_len, tiles.rows)
        self.k_tiles = ceil_div(self.k_len, tiles.columns)
        bytes_per_head = self.k_len * (self.dim + self.value_dim) * key.element_size()
        self.heads_at_once = self.group * max(1, _L2_BYTES // max(1, bytes_per_head))
        self.exact = query.dtype == torch.float32
        if not self.exact or (query.is_cuda and multiplies_in_tf32()):
            self.precision = "tf32"
        else:
            # Three tensor core products make one of float32; above 128 dimensions they do not fit a multiprocessor.
            fits = query.is_cuda and max(self.dim, self.value_dim) <= 128
            self.precision = "tf32x3" if fits else "ieee"

    def sizes(self) -> tuple[int, ...]:
        return self.batch, self.q_heads, self.group, self.q_len, self.k_len, self.q_tiles, self.k_tiles


def row_stride(ranges: Tensor) -> int:
    return 0 if ranges.shape[0] == 1 else ranges.stride(0)
