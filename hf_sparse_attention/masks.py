"""Which keys each query sees, worked out from what transformers hands to an attention function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

_MEMO = "_sparse_attention_memo"
# The dtype of masks that transformers made from padding; unlike an attribute it lasts through torch.compile.
_GENERATED = torch.uint8


@dataclass(frozen=True)
class Visibility:
    """The visible keys of every query.

    Attributes:
        attention_mask: bool (B or 1, H or 1, Q, K), True = visible; None where the ranges say everything.
        key_start, key_end: integer (B or 1, Q), half-open range of visible keys; None where the mask says everything.
        visible_keys: integer (B or 1, H or 1, Q), how many keys each query sees: n of the length scale.
        query_positions, key_positions: integer (B or 1, Q) and (B or 1, K) for ALiBi distances, counted over tokens
            that are visible at all, so that padding between two tokens adds no distance; None: plain indices.
    """

    attention_mask: Tensor | None
    key_start: Tensor | None
    key_end: Tensor | None
    visible_keys: Tensor
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None


def sparse_attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function registered for the presets: None or uint8 (B, 1, Q, K), 1 = visible.

    None wherever causality, a sliding window and packed documents say everything: :func:`visibility` knows them by
    itself, and a mask takes memory with the square of the length. The dtype tells a mask that transformers made from
    padding, in which document boundaries are missing, from a complete one that the user made.
    """
    if _is_causal_only(**kwargs):
        if kwargs.get("attention_mask") is None:
            return None
        kwargs["local_size"] = None
    mask = sdpa_mask(*args, **kwargs)
    if mask is None:
        return None
    return mask.to(_GENERATED) if torch.compiler.is_compiling() else mask.view(_GENERATED)


def _is_causal_only(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> bool:
    """Whether queries are all keys, and see the earlier ones, perhaps in the config's sliding window, but for padding.

    ``allow_is_causal_skip`` is False for masks of other forms.
    """
    is_plain = allow_is_causal_skip and local_size in (None, getattr(config, "sliding_window", None))
    return is_plain and isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length


def visibility(
    attention_mask: Tensor | None,
    query: Tensor,
    num_keys: int,
    *,
    is_causal: bool,
    sliding_window: int | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> Visibility:
    """Visible keys of ``query`` (B, H, Q, D) among ``num_keys`` keys.

    Document boundaries of packed rows come from ``cu_seqlens`` (documents + 1), ``seq_idx`` (B, Q) or restarts in
    ``position_ids`` (B or 1, Q), whichever are given; transformers' own masks drop them when a cache or a 2-D mask is
    present.

    Raises:
        ValueError: the mask has a shape or an additive bias that is not supported, or the boundaries do not fit.
    """
    num_queries = query.shape[2]
    check_boundaries(cu_seqlens, seq_idx, query.shape[0], num_queries, num_keys)
    if attention_mask is None:

        def rows_without_mask() -> Visibility:
            document_starts = _document_starts(query.device, num_queries, position_ids, cu_seqlens, seq_idx)
            return _without_mask(document_starts, num_queries, num_keys, is_causal, sliding_window, query.device)

        key = (num_queries, num_keys, is_causal, sliding_window, query.device)
        return memoised((position_ids, cu_seqlens, seq_idx), rows_without_mask, key)
    rows = memoised(
        (attention_mask, position_ids, cu_seqlens, seq_idx),
        lambda: _with_mask(attention_mask, query, num_keys, position_ids, cu_seqlens, seq_idx),
    )
    if rows.attention_mask is rows.key_start is None:
        return replace(rows, attention_mask=_as_bool(attention_mask))
    return rows


def check_boundaries(
    cu_seqlens: Tensor | None, seq_idx: Tensor | None, batch: int, num_queries: int, num_keys: int
) -> None:
    """Refuse document boundaries that cannot be applied; their values are read once for all layers of a forward."""
    if cu_seqlens is not None:
        if batch != 1 or num_queries != num_keys:
            raise ValueError(
                f"cu_seq_lens_q describes one flattened row without a cache, but the batch is {batch} with "
                f"{num_queries} queries and {num_keys} keys. Pass use_cache=False and one row, or drop cu_seq_lens_q."
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seq_lens_q has shape {tuple(cu_seqlens.shape)}; allowed: (documents + 1,).")

        def cover_the_row() -> None:
            covered = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_queries) & (cu_seqlens.diff() >= 0).all()
            _require(covered, "cu_seq_lens_q must ascend from 0 to the number of tokens in the row.")

        memoised((cu_seqlens,), cover_the_row, ("boundaries", num_queries))
    if seq_idx is not None and num_queries != num_keys:
        raise ValueError(
            f"seq_idx needs as many keys as queries, got {num_keys} and {num_queries}; pass use_cache=False."
        )


def check_key_boundaries(cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> None:
    """Raise ValueError unless the boundaries of the keys, where given, are those of the queries.

    On a GPU their values are read once for all layers of a forward; traced code stops with an assertion.
    """
    if cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q:
        return
    message = "cu_seq_lens_k differs from cu_seq_lens_q; only self-attention over packed rows is supported."
    if cu_seq_lens_q is None or cu_seq_lens_q.shape != cu_seq_lens_k.shape:
        raise ValueError(message)

    def compare() -> None:
        _require((cu_seq_lens_q == cu_seq_lens_k.to(cu_seq_lens_q.device)).all(), message)

    memoised((cu_seq_lens_q, cu_seq_lens_k), compare, "key boundaries")


def has_packed_documents(
    attention_mask: Tensor | None,
    query: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> bool:
    """Whether some row of ``query`` (B, Q, ...) holds several documents (reads the device once)."""
    if attention_mask is None:
        starts = _document_starts(query.device, query.shape[1], position_ids, cu_seqlens, seq_idx)
        return starts is not None and bool(starts.any())
    mask = _as_bool(attention_mask)
    slots = _own_slots(mask, _last_visible(mask))
    begins = _begins_document(mask, slots, position_ids, cu_seqlens, seq_idx)
    if begins is None:
        return False
    if is_own(attention_mask):
        # Branches of a tree restart too, but their tokens see what is before the branch.
        begins = begins & (mask.any(dim=1).int().argmax(-1) == slots)
    return bool(begins.any())


def is_own(attention_mask: Tensor | None) -> bool:
    """Whether the mask is a complete one that the user made."""
    return attention_mask is not None and attention_mask.dtype != _GENERATED


def _without_mask(
    document_starts: Tensor | None,
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    sliding_window: int | None,
    device: torch.device,
) -> Visibility:
    """Ranges when transformers gives no mask: one query sees all keys, more are aligned to the first keys."""
    index = torch.arange(num_queries, device=device)[None]
    if is_causal and num_queries > 1:
        start = torch.zeros_like(index) if document_starts is None else document_starts
        end = index + 1
    else:
        if document_starts is not None:
            _require(~document_starts.any(), "packed documents with bidirectional attention need a 4-D attention_mask")
        start, end = torch.zeros_like(index), torch.full_like(index, num_keys)
    if sliding_window is not None and sliding_window < num_keys:
        if not is_causal:
            raise ValueError("a sliding window with bidirectional attention needs a 4-D attention_mask")
        start = torch.maximum(start, end - sliding_window)
    return Visibility(None, start.to(torch.int32), end.to(torch.int32), (end - start)[:, None])


def _with_mask(
    attention_mask: Tensor,
    query: Tensor,
    num_keys: int,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> Visibility:
    batch, heads, num_queries, _ = query.shape
    expected = (batch, heads, num_queries, num_keys)
    shape = tuple(attention_mask.shape)
    # Compared one by one: torch.compile gets `in` wrong for symbolic sizes.
    wrong = len(shape) != 4 or any(s != 1 and s != e for s, e in zip(shape[:2], expected[:2]))
    if wrong or shape[2:] != expected[2:]:
        raise ValueError(
            f"attention_mask has shape {shape}; expected ({batch} or 1, {heads} or 1, {num_queries}, {num_keys})."
        )
    mask = given = _as_bool(attention_mask)
    last = _last_visible(mask)
    slots = _own_slots(mask, last)
    is_generated = not is_own(attention_mask)
    if is_generated:
        mask = _separate_documents(mask, slots, position_ids, cu_seqlens, seq_idx)
        last = last if mask is given else _last_visible(mask)
    counts = mask.sum(-1)
    if mask.shape[1] == 1:
        start = mask[:, 0].int().argmax(-1)
        if _has_no_holes((counts[:, 0] == last + 1 - start).all(), is_generated):
            # Ranges say the same, and every backend is faster with them.
            start, end = start.to(torch.int32), (last + 1).to(torch.int32)
            return Visibility(None, start, end, counts, slots.clamp(min=0))
    key_positions = (_is_seen(mask).cumsum(-1) - 1).clamp(min=0)
    query_positions = key_positions.gather(-1, slots.clamp(min=0))
    # A mask that is right as it was given is not kept on itself: that cycle would hold its memory.
    own = None if mask is given else mask
    return Visibility(own, None, None, counts, query_positions, key_positions)


def _has_no_holes(answer: Tensor, is_generated: bool) -> bool:
    """The value of ``answer``; where it cannot be read, a GPU is made to check it, and a CPU says no."""
    if not is_traced(answer):
        return bool(answer)
    if not (is_generated and answer.is_cuda):
        return False
    _require(
        answer,
        "attention_mask hides tokens between visible ones, which sparse attention does not support in compiled code "
        "and CUDA graphs: pad on one side, or run eagerly.",
    )
    return True


def _separate_documents(
    mask: Tensor,
    slots: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """Hide keys of other documents from a mask that transformers made without their boundaries."""
    begins = _begins_document(mask, slots, position_ids, cu_seqlens, seq_idx)
    if begins is None or (not is_traced(begins) and not bool(begins.any())):
        return mask
    # The first query may go on with a document that is in the cache.
    first = slots.where(begins, 0).cummax(-1).values
    # A constant: the number of keys would fix the length of exported code.
    never = torch.iinfo(torch.int32).max
    following = slots.where(begins, never)[:, 1:].flip(-1).cummin(-1).values.flip(-1)
    end = torch.nn.functional.pad(following, (0, 1), value=never)
    keys = torch.arange(mask.shape[3], device=mask.device)
    return mask & (keys >= first[:, None, :, None]) & (keys < end[:, None, :, None])


def _begins_document(
    mask: Tensor, slots: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """Whether each query is a token, not padding, of another document than the token before it, (B, Q)."""
    num_queries = mask.shape[2]
    if num_queries == 1:
        return None
    if num_queries == mask.shape[3]:
        is_token = _is_seen(mask)
    else:
        is_token = slots > torch.nn.functional.pad(slots[:, :-1], (1, 0), value=-1)
    index = torch.arange(num_queries, device=mask.device)
    latest = index.where(is_token, -1).cummax(-1).values
    before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    differs = _differs(mask.device, num_queries, position_ids, cu_seqlens, seq_idx, before.clamp(min=0))
    return None if differs is None else differs & is_token & (before >= 0)


def _document_starts(
    device: torch.device,
    num_queries: int,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor | None:
    """Index of the first query of each query's document, (B or 1, Q); None where nothing can tell."""
    if num_queries == 1:
        return None
    differs = _differs(device, num_queries, position_ids, cu_seqlens, seq_idx)
    if differs is None:
        return None
    index = torch.arange(num_queries, device=device)
    return index.where(differs, 0).cummax(-1).values


def _differs(
    device: torch.device,
    num_queries: int,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    before: Tensor | None = None,
) -> Tensor | None:
    """Whether each query's document is not that of the query ``before`` (B, Q), by default its neighbour's.

    (B or 1, Q), or None where nothing can tell; the first query has none before it, and False unless ``before`` says.
    """

    def compared(values: Tensor, step: int) -> Tensor:
        beside = torch.nn.functional.pad(values[:, 1:] != values[:, :-1] + step, (1, 0))
        if before is None:
            return beside
        values = values.expand(before.shape[0], -1)
        apart = values != values.gather(-1, before) + step
        # Positions may count padding between two tokens, or not.
        return apart & beside if step else apart

    differs = []
    if position_ids is not None:
        if position_ids.dim() != 2:
            raise ValueError(f"position_ids has {position_ids.dim()} dimensions; expected (batch, length).")
        differs.append(compared(position_ids, 1))
    if seq_idx is not None:
        differs.append(compared(seq_idx, 0))
    if cu_seqlens is not None:
        index = torch.arange(num_queries, device=device)
        bounds = cu_seqlens.to(device=device, dtype=index.dtype)
        differs.append(compared(torch.searchsorted(bounds, index, right=True)[None], 0))
    return functools.reduce(torch.logical_or, differs) if differs else None


def _own_slots(mask: Tensor, last_visible: Tensor) -> Tensor:
    """The key that each query itself is, (B, Q): with a cache the last one it sees, or -1."""
    num_queries, num_keys = mask.shape[2:]
    if num_queries != num_keys:
        return last_visible
    return torch.arange(num_queries, device=mask.device).expand(mask.shape[0], -1)


def _is_seen(mask: Tensor) -> Tensor:
    """Which keys any query sees, (B, K): all but padding."""
    return mask.any(dim=1).any(dim=1)


def _last_visible(mask: Tensor) -> Tensor:
    """Index of the last visible key of each query, (B, Q); -1 where there is none."""
    rows = mask.any(dim=1)
    last = rows.shape[-1] - 1 - rows.flip(-1).int().argmax(-1)
    return torch.where(rows.any(-1), last, torch.full_like(last, -1))


def _as_bool(mask: Tensor) -> Tensor:
    """A user's float mask as bool: 0 is visible, a large negative number or -inf hidden, anything else refused."""
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype == _GENERATED:
        return mask != 0
    if not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be bool or floating point, got {mask.dtype}.")
    visible = mask > torch.finfo(torch.float16).min / 2
    _require(
        (mask.where(visible, torch.zeros_like(mask)) == 0).all(),
        "the 4-D attention_mask holds values other than 0 and a large negative number: additive biases are not "
        "supported by sparse attention. Use a bool mask, or ALiBi through position_encoding.",
    )
    return visible


def _require(condition: Tensor, message: str) -> None:
    """Raise ValueError with the message unless the condition holds; traced code stops with it when it runs.

    Then a CPU raises RuntimeError. On a GPU an assertion fails in a kernel: the message is on stderr, a later call
    that waits for the GPU raises RuntimeError without it, and the process cannot use the GPU any more.
    """
    if is_traced(condition):
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


def is_traced(tensor: Tensor) -> bool:
    """Whether the tensor's values cannot be read now: in compiled code, and while a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def memoised(inputs: tuple[Tensor | None, ...], compute: Callable[[], Any], key: Hashable = None) -> Any:
    """``compute()`` once for the same inputs, kept on the first: all layers of a forward are handed the same ones.

    ``key`` tells computations from the same first input apart. Nothing is kept where the first input is None, nor in
    compiled code or while a CUDA graph is captured, which must follow inputs that are overwritten.
    """
    first = inputs[0]
    if first is None or is_traced(first):
        return compute()
    # Inference tensors are of no use to a later training step.
    key = key, torch.is_inference_mode_enabled()
    versions = [None if t is None or t.is_inference() else t._version for t in inputs]
    memos = getattr(first, _MEMO, None)
    if memos is None:
        memos = {}
        setattr(first, _MEMO, memos)
    memo = memos.get(key)
    if memo is None or memo[1] != versions or any(a is not b for a, b in zip(memo[0], inputs[1:])):
        memo = memos[key] = (inputs[1:], versions, compute())
    return memo[2]
