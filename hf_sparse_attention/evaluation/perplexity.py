"""Perplexity against context length: the same target tokens at every length, only their context grows.

A window ends at some token of a document; its last ``target_tokens`` tokens are the targets. At length L the model
reads the L tokens up to that end, so a longer context differs from a shorter one by older tokens alone. Windows never
cross documents. Differences between lengths are then due to the context, not to easier or harder text.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .checkpoints import reset_dynamic_rope


@dataclass(frozen=True)
class PerplexityPlan:
    """Which tokens are predicted, from which contexts.

    Args:
        lengths: tokens of the windows, BOS included, ascending.
        target_tokens: how many last tokens of a window are predicted; fewer than the shortest length.
        stride: tokens from one window's end to the next one's within a document; at least ``target_tokens``, so that
            no token is counted twice.
        windows_per_document: at most so many, so that long documents do not dominate; None: all.
        bos_id: put this token first in every window (in place of its oldest token); None: windows start within text.
        positions_per_bucket: losses by position are taken at most at so many evenly spaced positions of a bucket.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    lengths: tuple[int, ...]
    target_tokens: int
    stride: int
    windows_per_document: int | None = None
    bos_id: int | None = None
    positions_per_bucket: int = 256

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 2:
            raise ValueError(f"lengths are {self.lengths}; they must be ascending, different and at least 2.")
        room = self.lengths[0] - 1
        if not 1 <= self.target_tokens <= room:
            raise ValueError(
                f"target_tokens is {self.target_tokens}; allowed: 1 to {room}, one less than the shortest length."
            )
        if self.stride < self.target_tokens:
            raise ValueError(f"stride is {self.stride}; allowed: at least target_tokens ({self.target_tokens}).")
        for name in ("windows_per_document", "positions_per_bucket"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: at least 1.")

    @property
    def max_length(self) -> int:
        return self.lengths[-1]

    def buckets(self) -> list[tuple[int, int]]:
        """Half-open ranges of positions in the longest window, each twice as wide as the one before."""
        edges = [1]
        while edges[-1] < self.max_length:
            edges.append(min(edges[-1] * 2, self.max_length))
        first = next(i for i, edge in enumerate(edges) if edge >= min(16, self.max_length))
        edges = [1, *edges[first:]]
        return list(pairwise(edges))


@dataclass(frozen=True)
class Window:
    """Where the targets of one window end: at token ``end`` of a document."""

    document: int
    end: int  # exclusive
    whole: bool  # overlaps no other whole window, so that losses by position count no token twice


@dataclass(frozen=True)
class WindowLoss:
    """Summed loss (nats) of one window's targets, or of one bucket of its positions."""

    document: int
    length: int
    nll: float
    tokens: int
    bucket: int | None = None


def make_windows(documents: Sequence[Sequence[int]], plan: PerplexityPlan) -> list[Window]:
    """The windows of all documents that hold the longest one; the others are left out at every length.

    Raises:
        ValueError: no document is long enough.
    """
    text_tokens = plan.max_length - (plan.bos_id is not None)
    windows = []
    for index, ids in enumerate(documents):
        ends = list(range(text_tokens, len(ids) + 1, plan.stride))[: plan.windows_per_document]
        covered = 0
        for end in ends:
            whole = end - text_tokens >= covered
            covered = end if whole else covered
            windows.append(Window(index, end, whole))
    if not windows:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"the text is too short for length {plan.max_length}: its longest document has {longest} tokens. "
            f"Use shorter lengths or longer documents."
        )
    return windows


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    windows: Sequence[Window],
    plan: PerplexityPlan,
    length: int,
) -> list[WindowLoss]:
    """Losses of one batch of windows at one length; at the longest one also by position.

    Raises:
        ValueError: a loss is not a finite number.
    """
    reset_dynamic_rope(model)
    ids = torch.tensor([_window_ids(documents[w.document], w.end, length, plan.bos_id) for w in windows])
    ids = ids.to(model.device)  # [B, L]
    targets = torch.arange(length - plan.target_tokens, length)
    buckets = []
    if length == plan.max_length and any(window.whole for window in windows):
        buckets = [_spread(low, high, plan.positions_per_bucket) for low, high in plan.buckets()]
    losses = _losses_at(model, ids, torch.cat([targets, *buckets]))  # [B, targets + positions]
    if not losses.isfinite().all():
        raise ValueError(f"the loss at length {length} is not a finite number.")
    target_losses, *bucket_losses = losses.split([len(targets), *map(len, buckets)], dim=1)
    results = [
        WindowLoss(window.document, length, nll, plan.target_tokens)
        for window, nll in zip(windows, target_losses.sum(1).tolist(), strict=True)
    ]
    for number, values in enumerate(bucket_losses):
        for window, nll in zip(windows, values.sum(1).tolist(), strict=True):
            if window.whole:
                results.append(WindowLoss(window.document, length, nll, values.shape[1], bucket=number))
    return results


def run_plan(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    plan: PerplexityPlan,
    *,
    batch_tokens: int = 8192,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[WindowLoss]:
    """This process's share of all losses.

    Batches do not depend on the number of processes, which take turns at them: the union is the same for any number.

    Args:
        batch_tokens: about how many tokens go through the model at once.
        progress: called with (tokens done by this step, length).
    """
    windows = make_windows(documents, plan)
    results = []
    for length in plan.lengths:
        size = max(1, batch_tokens // length)
        batches = [windows[i : i + size] for i in range(0, len(windows), size)]
        for batch in batches[process::processes]:
            results.extend(window_losses(model, documents, batch, plan, length))
            if progress:
                progress(len(batch) * length, length)
    return results


def summarize_positions(losses: Sequence[WindowLoss], plan: PerplexityPlan) -> list[dict[str, float | int]]:
    """Mean loss (nats) by position in the longest window; ``first`` and ``last`` count context tokens, inclusive."""
    summary = []
    for number, (low, high) in enumerate(plan.buckets()):
        found = [loss for loss in losses if loss.bucket == number]
        tokens = sum(loss.tokens for loss in found)
        mean = math.fsum(loss.nll for loss in found) / tokens
        summary.append({"first": low, "last": high - 1, "loss": mean, "tokens": tokens})
    return summary


def unigram_perplexity(documents: Sequence[Sequence[int]]) -> float:
    """What the best context-free model, fitted to this very text, would score: a floor any trained model must beat."""
    counts = Counter(token for ids in documents for token in ids)
    total = sum(counts.values())
    return math.exp(-math.fsum(n * math.log(n / total) for n in counts.values()) / total)


def _window_ids(ids: Sequence[int], end: int, length: int, bos_id: int | None) -> list[int]:
    if bos_id is None:
        return list(ids[end - length : end])
    return [bos_id, *ids[end - length + 1 : end]]


def _spread(low: int, high: int, count: int) -> torch.Tensor:
    """At most ``count`` evenly spaced integers of [low, high)."""
    count = min(count, high - low)
    return low + torch.arange(count) * (high - low) // count


def _losses_at(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Losses (B, positions) in float32 of the tokens at ``positions`` (each at least 1)."""
    before = (positions - 1).to(ids.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=before).logits
    else:
        logits = model(input_ids=ids, use_cache=False).logits[:, before]
    labels = ids[:, positions.to(ids.device)]
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).double()
