"""The threshold of alpha-entmax, found by Newton's method on whole rows of scores, without sorting.

With ``s = (alpha - 1) (z - max z)`` and ``beta = 1 / (alpha - 1)`` (Peters et al., arXiv 1905.05702, eq. 5),

    p_i = x_i ** beta,   x_i = max(s_i - tau, 0),   sum p = 1.

``g(tau) = (sum p) ** (1 / beta)`` is a norm of x, hence convex and decreasing: from ``tau = -1``, where it is at least
1, Newton's steps on ``g - 1`` never pass the root, so they need no safeguard. Stopping at ``sum p = 1 + e`` and
dividing by the sum gives the exact entmax of scores divided by g, ``g - 1 ~ (alpha - 1) e``.

Small alpha - 1 puts tau next to -1 and raises x to a large power; there ``tau + 1`` is stored instead of tau and
``log1p`` replaces ``log``, which turns into softmax (with ``tau + 1`` next to 0) as alpha goes to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below this value of alpha - 1 the stored threshold is tau + 1.
_SHIFTED_BELOW = 0.25
_TINY = 1e-30
# Next to alpha = 2 the power of _TINY is too near 1 to be told from others.
_LEAST_FLOOR = 1e-2
_MAX_STEPS = 100


def score_factor(alpha: float) -> float:
    """What turns scores z into s: ``alpha - 1``, or 1 for softmax."""
    return 1.0 if alpha == 1.0 else alpha - 1.0


def powers(scores: Tensor, tau: Tensor, alpha: float, slope: Tensor, weight: Tensor) -> Tensor:
    """``slope = x ** (beta - 1)`` and ``weight = x ** beta``, each exactly 0 outside the support.

    Args:
        scores: s, relative to the maximum of its row, (..., n), float32 or float64; -inf where not visible.
        tau: stored threshold (..., 1); not used for softmax.
        alpha: in [1, 2].
        slope: buffer like ``scores``, may be ``scores`` itself, and is so for softmax.
        weight: buffer like ``scores``, another one than ``scores`` and ``slope``.

    Returns:
        The weight: its buffer, or for softmax, where both are ``exp(s)``, that of the slope.
    """
    if alpha == 1.0:
        return _exp_(slope)
    torch.sub(scores, tau, out=slope)
    if alpha == 1.5:
        slope.relu_()
        return torch.mul(slope, slope, out=weight)
    if alpha == 2.0:
        torch.clamp(slope, min=0.0, out=weight)
        torch.sign(weight, out=slope)
        return weight
    exponent = 1.0 / (alpha - 1.0) - 1.0
    if alpha - 1.0 < _SHIFTED_BELOW:
        torch.clamp(slope, min=-1.0, out=weight)
        torch.log1p(weight, out=slope)
        weight.add_(1.0)
        _exp_(slope.mul_(exponent))
    else:
        torch.clamp(slope, min=_TINY, out=weight)
        torch.log(weight, out=slope)
        slope.mul_(exponent)
        floor = math.log(_TINY) * exponent
        if floor < -_LEAST_FLOOR:
            _exp_(slope, floor=floor)
        else:
            slope.exp_().masked_fill_(weight <= 2.0 * _TINY, 0.0)
    return weight.mul_(slope)


def solve(scores: Tensor, alpha: float, slope: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold of every row of ``scores``; the buffers are those of :func:`powers`.

    Args:
        scores: s, relative to the maximum of its row, (..., n); -inf where not visible, also in a whole row.

    Returns:
        The unnormalised weights (a buffer), the stored threshold (..., 1) and the sum of the weights (..., 1), which
        is 0 for rows without a visible entry.
    """
    tau = scores.new_full((*scores.shape[:-1], 1), 0.0 if alpha - 1.0 < _SHIFTED_BELOW else -1.0)
    weights = powers(scores, tau, alpha, slope, weight)
    total = weights.sum(-1, keepdim=True)
    if alpha == 1.0:
        return weights, tau, total

    limit = 1.0 + 4.0 * torch.finfo(scores.dtype).eps
    # A CUDA graph cannot ask whether all rows are solved: it takes every step.
    may_ask = not (scores.is_cuda and torch.cuda.is_current_stream_capturing())
    for _ in range(_MAX_STEPS):
        unsolved = total > limit
        if may_ask and not unsolved.any():
            break
        # Newton on g: (total - total ** (2 - alpha)) / ((alpha - 1) dg/dtau), exact also for alpha next to 1.
        step = total.log().mul_(1.0 - alpha).expm1_().mul_(total).div_(slope.sum(-1, keepdim=True))
        following = torch.where(unsolved, tau - step, tau)
        if may_ask and torch.equal(following, tau):
            break
        tau = following
        weights = powers(scores, tau, alpha, slope, weight)
        total = weights.sum(-1, keepdim=True)
    return weights, tau, total


def _exp_(exponents: Tensor, floor: float = -math.inf) -> Tensor:
    """In-place exp, 0 for exponents up to ``floor`` and for those whose result would be subnormal.

    On a CPU, exp takes twenty times longer for subnormal results and infinite arguments.
    """
    floor = max(floor, math.log(torch.finfo(exponents.dtype).tiny) + 0.1)
    exponents.clamp_min_(floor).exp_()
    return torch.nn.functional.threshold_(exponents, math.exp(floor) * (1.0 + 1e-4), 0.0)
