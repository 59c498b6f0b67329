"""Support size, entropy, exact zeros and length scale of every head, against the number n of visible keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capture import LayerAttention, observe_attention, run

MEASURES = ("support", "entropy", "zeros", "scale")
_MAX_RANGES = 40


class AttentionStatistics:
    """Means over the queries that see n keys, per layer, head and range of n: 2, 3 to 4, 5 to 8, 9 to 16, ...

    - ``support``: keys with a weight above 0;
    - ``entropy``: normalised, H / log n: 0 for one key, 1 for equal weights on all visible keys;
    - ``zeros``: share of the visible keys with a weight of exactly 0;
    - ``scale``: t, the factor of the scores (the inverse of a temperature), 1 where no length scale applies;
    - ``beta`` and ``gamma``: means over all tokens, NaN where no length scale applies.

    A weight too small for the model's dtype counts as 0: float32 softmax reaches down to 1e-38, float16 to 6e-8.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {name: [] for name in (*MEASURES, "keys", "queries")}
        self._parameters: dict[str, list[Tensor]] = {"beta": [], "gamma": []}
        self._tokens: list[int] = []
        self._slopes: list[Tensor] = []

    @torch.no_grad()
    def add(self, attention: LayerAttention) -> None:
        """Count the queries of one layer of one forward; those that see fewer than two keys are left out."""
        weights = attention.weights
        batch, heads, queries, _ = weights.shape
        self._grow(attention.layer, attention)
        n = attention.visible.visible_keys.expand(batch, heads, queries)
        for head in range(heads):
            # Head by head: the entropy needs another copy of the weights.
            own, count = weights[:, head].float(), n[:, head].double()
            support = (own > 0).sum(-1).double()
            entropy = torch.special.entr(own).sum(-1, dtype=torch.float64)
            measured = {
                "support": support,
                "entropy": entropy / count.log(),
                "zeros": 1.0 - support / count,
                "scale": attention.scale[:, head].double(),
                "keys": count,
                "queries": torch.ones_like(count),
            }
            chosen = count >= 2
            # 2 ** (exponent - 1) < n <= 2 ** exponent
            ranges = torch.frexp(count[chosen] - 1).exponent.long() - 1
            for name, values in measured.items():
                sums = torch.zeros(_MAX_RANGES, dtype=torch.float64, device=weights.device)
                sums.index_add_(0, ranges, values[chosen])
                self._sums[name][attention.layer][head] += sums.cpu()
        self._tokens[attention.layer] += batch * queries
        for name in self._parameters:
            values = getattr(attention, name)
            if values is not None:
                total = values.expand(batch, heads, queries).sum((0, 2), dtype=torch.float64)
                total = total.masked_fill(~attention.scaled, torch.nan)
                self._parameters[name][attention.layer] += total.cpu()
            else:
                self._parameters[name][attention.layer] += torch.nan

    def _grow(self, layer: int, attention: LayerAttention) -> None:
        if layer < len(self._tokens):
            return
        heads = attention.weights.shape[1]
        for sums in self._sums.values():
            sums.append(torch.zeros(heads, _MAX_RANGES, dtype=torch.float64, device="cpu"))
        for sums in self._parameters.values():
            sums.append(torch.zeros(heads, dtype=torch.float64, device="cpu"))
        self._tokens.append(0)
        self._slopes.append(attention.slopes.cpu())

    def to_dict(self) -> dict[str, Any]:
        """Nested lists of numbers, NaN where a layer has no query in a range (a sliding window bounds n).

        Returns:
            ``ranges``: first and last n of each range; ``keys`` (mean n) and ``queries`` (how many) of the first
            head, [layer][range]; the measures, [layer][head][range]; ``beta``, ``gamma``, ``alibi_slope``,
            [layer][head].

        Raises:
            ValueError: no query that sees two keys was added.
        """
        queries = torch.stack([sums[0] for sums in self._sums["queries"]]) if self._tokens else torch.zeros(1, 1)
        used = int((queries.sum(0) > 0).nonzero().amax()) + 1 if queries.any() else 0
        if not used:
            raise ValueError("no token with two visible keys was seen; at least one text of two tokens is needed.")
        result: dict[str, Any] = {"ranges": [{"first": (1 << i) + 1, "last": 2 << i} for i in range(used)]}
        result["queries"] = queries[:, :used].long().tolist()
        result["keys"] = [(s[0] / q[0])[:used].tolist() for s, q in self._by_layer("keys")]
        for name in MEASURES:
            result[name] = [(s / q)[:, :used].tolist() for s, q in self._by_layer(name)]
        for name, sums in self._parameters.items():
            result[name] = [(total / tokens).tolist() for total, tokens in zip(sums, self._tokens)]
        result["alibi_slope"] = [slopes.tolist() for slopes in self._slopes]
        return result

    def _by_layer(self, name: str) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._sums[name], self._sums["queries"]))


def analyze(model: nn.Module, documents: Sequence[Sequence[int] | Tensor]) -> AttentionStatistics:
    """Statistics of all heads of ``model`` over documents of token ids, each read by itself from its first token.

    One layer's weights are in memory at a time, with the copies of the dense computation: up to about
    100 * heads * L ** 2 bytes for entmax and a document of L tokens, and a fifth of it for softmax.

    Raises:
        ValueError: no layer of the model has sparse attention, or a document is empty.
    """
    statistics = AttentionStatistics()
    with observe_attention(model, statistics.add):
        for tokens in documents:
            run(model, tokens)
    return statistics


def by_head_type(result: dict[str, Any], measure: str) -> dict[str, dict[str, list[float]]]:
    """Median, smallest and largest mean of the heads of all layers, one number per range, for each type of head.

    Args:
        result: from :meth:`AttentionStatistics.to_dict`.
        measure: ``support``, ``entropy``, ``zeros`` or ``scale``.

    Returns:
        For the types of head that exist, ``ALiBi`` and ``no ALiBi``: ``median``, ``low``, ``high``.
    """
    values = torch.tensor(result[measure], dtype=torch.float64).flatten(0, 1)  # [layers * heads, ranges]
    has_alibi = torch.tensor(result["alibi_slope"]).flatten() > 0
    summary = {}
    for name, chosen in (("ALiBi", has_alibi), ("no ALiBi", ~has_alibi)):
        if chosen.any():
            # Not torch.median: it takes the lower of two middle heads.
            low, median, high = torch.nanquantile(values[chosen], torch.tensor([0.0, 0.5, 1.0]).double(), dim=0)
            summary[name] = {"median": median.tolist(), "low": low.tolist(), "high": high.tolist()}
    return summary
