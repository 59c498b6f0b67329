"""Perplexity for each context length, with a bootstrap interval over documents."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Perplexity by context length: exp(sum of losses / number of target tokens) over all windows of one length. Documents,
not tokens, are what was sampled, so the confidence interval resamples whole documents.
"""

_KWARGS_DESCRIPTION = """
Args:
    nll (list of float): summed negative log likelihood of the targets of one window, in nats.
    tokens (list of int): number of targets in that window.
    lengths (list of int): context length of that window.
    documents (list of int): which document the window is from.
    confidence (float): of the interval, between 0 and 1. Default: 0.95.
    resamples (int): bootstrap resamples of the documents. Default: 1000.
    seed (int): of the resampling. Default: 0.
Returns:
    one entry per length (as a string): perplexity, loss (nats per token), low and high (bounds of the interval of the
    perplexity), tokens, documents.
Examples:
    >>> metric = evaluate.load(metric_path("perplexity_by_length"))
    >>> metric.compute(nll=[0.0, 2.0], tokens=[1, 1], lengths=[8, 8], documents=[0, 1])["8"]["perplexity"]
    2.718281828459045
"""


class PerplexityByLength(evaluate.Metric):
    """``perplexity_by_length`` as an ``evaluate`` metric."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "nll": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "lengths": datasets.Value("int64"),
                    "documents": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        nll: Sequence[float],
        tokens: Sequence[int],
        lengths: Sequence[int],
        documents: Sequence[int],
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, dict[str, float | int]]:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence!r}; allowed: between 0 and 1.")
        if min(tokens) < 1:
            raise ValueError(f"tokens: every window needs at least one target, got {min(tokens)}.")
        totals: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        for loss, count, length, document in zip(nll, tokens, lengths, documents, strict=True):
            totals[int(length)][int(document)][0] += loss
            totals[int(length)][int(document)][1] += count
        return {
            str(length): _summary(
                np.array([totals[length][d] for d in sorted(totals[length])]), confidence, resamples, seed
            )
            for length in sorted(totals)
        }


def _summary(per_document: np.ndarray, confidence: float, resamples: int, seed: int) -> dict[str, float | int]:
    """``per_document``: (documents, 2), summed loss and number of targets."""
    loss = per_document[:, 0].sum() / per_document[:, 1].sum()
    # The same seed at every length resamples the same documents, so the intervals of two lengths move together.
    picks = np.random.default_rng(seed).integers(len(per_document), size=(resamples, len(per_document)))
    sums = per_document[picks].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "perplexity": _exp(loss),
        "loss": float(loss),
        "low": _exp(low),
        "high": _exp(high),
        "tokens": int(per_document[:, 1].sum()),
        "documents": len(per_document),
    }


def _exp(loss: float) -> float:
    """Infinity instead of an overflow error for a loss beyond 709 nats."""
    return math.exp(loss) if loss < 709 else math.inf
