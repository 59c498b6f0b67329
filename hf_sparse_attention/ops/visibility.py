"""Which keys each query sees: everything but an arbitrary mask becomes one half-open key range per query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Visibility(NamedTuple):
    """Keys visible to each query: ``key_start <= j < key_end`` and ``attention_mask[..., j]``.

    ``key_start`` and ``key_end`` are int32 of shape (B or 1, Lq), within [0, Lk] if they were clamped, or None for
    "from the first key" and "to the last key". A range whose end is not after its start is empty. ``attention_mask``
    is a bool of four dimensions broadcastable to (B, Hq, Lq, Lk), or None.
    """

    key_start: Tensor | None
    key_end: Tensor | None
    attention_mask: Tensor | None

    def ranges(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``key_start`` and ``key_end`` as tensors in every case, int32 (B or 1, Lq)."""
        shape, options = (1, query.shape[2]), {"dtype": torch.int32, "device": query.device}
        start = torch.zeros(shape, **options) if self.key_start is None else self.key_start
        end = torch.full(shape, key.shape[2], **options) if self.key_end is None else self.key_end
        return start, end

    def dense(self, query: Tensor, key: Tensor) -> Tensor | None:
        """The same as one bool mask broadcastable to (B, Hq, Lq, Lk); None when every key is visible."""
        mask = self.attention_mask
        if self.key_start is None and self.key_end is None:
            return mask
        start, end = self.ranges(query, key)
        keys = torch.arange(key.shape[2], device=query.device, dtype=torch.int32)
        in_range = ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]  # [B or 1, 1, Lq, Lk]
        return in_range if mask is None else in_range & mask


def resolve_visibility(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    sliding_window: int | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    clamp: bool = True,
) -> Visibility:
    """Collapse every kind of visibility to a :class:`Visibility`; all given conditions hold together.

    Args:
        query: (B, Hq, Lq, D). Query i stands at key position ``i + Lk - Lq``.
        key: (B, Hk, Lk, D).
        is_causal: a query sees no key after its own position.
        sliding_window: a query sees keys less than this many positions before it (and after it, unless causal).
        attention_mask: bool, broadcastable to (B, Hq, Lq, Lk), True where visible.
        cu_seqlens: int (documents + 1,), ascending from 0 to Lk: boundaries of packed documents.
        key_start: int (B or 1, Lq), first visible key.
        key_end: int (B or 1, Lq), one past the last visible key.
        clamp: False where what reads the ranges bears bounds outside of [0, Lk].
    """
    query_length, key_length = query.shape[2], key.shape[2]
    starts: list[Tensor] = [] if key_start is None else [key_start]
    ends: list[Tensor] = [] if key_end is None else [key_end]

    # A single causal query stands on the last key: nothing lies after it.
    if is_causal and query_length != 1:
        first_end = key_length - query_length + 1
        ends.append(torch.arange(first_end, key_length + 1, device=query.device, dtype=torch.int32)[None])
    if sliding_window is not None:
        # No distance is larger, and sums with larger windows could overflow.
        sliding_window = min(sliding_window, query_length + key_length)
        own_position = torch.arange(query_length, device=query.device)[None] + (key_length - query_length)
        starts.append(own_position - (sliding_window - 1))
        if not is_causal:
            ends.append(own_position + sliding_window)
    if cu_seqlens is not None:
        boundaries = cu_seqlens.to(torch.int64)
        tokens = torch.arange(query_length, device=query.device)
        document = torch.searchsorted(boundaries, tokens, right=True)
        # Tokens after the last boundary belong to no document: their range is empty.
        padded = torch.cat([boundaries, boundaries[-1:]])
        starts.append(padded[document - 1][None])
        ends.append(padded[document][None])

    return Visibility(
        _combine(starts, torch.maximum, key_length, clamp),
        _combine(ends, torch.minimum, key_length, clamp),
        attention_mask,
    )


def _combine(bounds: list[Tensor], tightest, key_length: int, clamp: bool) -> Tensor | None:
    if not bounds:
        return None
    result = bounds[0]
    for bound in bounds[1:]:
        result = tightest(result.to(torch.int64), bound.to(torch.int64))
    if result.dtype == torch.int32 and not clamp:
        return result
    return result.clamp(0, key_length).to(torch.int32)


def alibi_positions(
    query_length: int,
    key_length: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Positions between which ALiBi measures distance, int64 (B or 1, Lq) and (B or 1, Lk)."""
    if query_positions is None:
        query_positions = torch.arange(query_length, device=device)[None] + (key_length - query_length)
    if key_positions is None:
        key_positions = torch.arange(key_length, device=device)[None]
    return query_positions.to(torch.int64), key_positions.to(torch.int64)
