"""The threshold of alpha-entmax: powers, the bound carried through the sweep, and the step that solves for it.

In units of ``s = (alpha - 1) z`` with ``beta = 1 / (alpha - 1)`` the threshold ``tau`` of a row solves
``F(tau) = sum_i max(s_i - tau, 0)^beta = 1``. See the README beside this file for the derivations.
"""

import triton
import triton.language as tl

# How a score becomes a weight; compile-time values of the kernels' ``KIND``.
SOFTMAX = tl.constexpr(0)
SPARSEMAX = tl.constexpr(1)
ENTMAX15 = tl.constexpr(2)
ENTMAX = tl.constexpr(3)

# Initial row maximum and bound: below every score, and finite so that -inf - NOTHING is not NaN.
NOTHING = tl.constexpr(-1.0e30)
# Threshold of a row that sees no key: above every score.
UNREACHABLE = tl.constexpr(1.0e30)
# Share of the tolerance that a flatness estimated from some of the tiles allows.
ESTIMATED = tl.constexpr(0.6)


@triton.jit
def positive_part(x):
    """``max(x, 0)`` of a margin, which never exceeds 1: a clamp to [0, 1] is part of the instruction before it."""
    return tl.clamp(x, 0.0, 1.0)


@triton.jit
def powers(x, beta, KIND: tl.constexpr):
    """``x^beta`` and ``x^(beta - 1)`` for ``x >= 0``, both 0 where x is 0."""
    if KIND == ENTMAX15:
        return x * x, x
    elif KIND == SPARSEMAX:
        return x, tl.where(x > 0, 1.0, 0.0)
    else:
        log = tl.log2(tl.where(x > 0, x, 1.0))
        u = tl.where(x > 0, tl.exp2((beta - 1) * log), 0.0)
        return u * x, u


@triton.jit
def curvature(x, beta, KIND: tl.constexpr):
    """``x^(beta - 2)``, 0 where x is 0; bounded near 0 for beta < 2: only the quality of a step depends on it."""
    if KIND == ENTMAX15:
        return tl.where(x > 0, 1.0, 0.0)
    elif KIND == SPARSEMAX:
        return tl.zeros_like(x)
    else:
        return tl.where(x > 0, tl.exp2((beta - 2) * tl.log2(tl.maximum(x, 0.0009765625))), 0.0)


@triton.jit
def root(value, beta, KIND: tl.constexpr):
    """``value^(1 / beta)`` for ``value >= 0``."""
    if KIND == ENTMAX15:
        return tl.sqrt(value)
    elif KIND == SPARSEMAX:
        return value
    else:
        return tl.where(value > 0, tl.exp2(tl.log2(tl.where(value > 0, value, 1.0)) / beta), 0.0)


@triton.jit
def newton_step(f, d, beta, KIND: tl.constexpr):
    """Newton step on ``F^(1/beta)``, convex and decreasing in tau: from anywhere it lands left of the root."""
    d = tl.where(d > 0, d, 1.0)
    r = root(f, beta, KIND)
    return tl.where(f > 0, (f - f / tl.where(r > 0, r, 1.0)) / d, 0.0)


@triton.jit
def highest_offset(m):
    """The largest threshold, relative to the row maximum m, that leaves the maximum a weight in float32."""
    return -(tl.abs(m) * 2.384185791015625e-07 + 1.0e-30)


@triton.jit
def curvature_flatness(f, d, c, beta):
    """``1 - a`` where F behaves like ``(T - t)^(1/a)``, from the sums at one t. # [BM]"""
    safe_d = tl.where(d > 0, d, 1.0)
    return tl.where(f > 0, (1.0 - 1.0 / beta) * f * c / (safe_d * safe_d), 1.0 - 1.0 / beta)


@triton.jit
def secant_flatness(f, d, former_f, former_d, flatness, trust):
    """``1 - a`` from the sums at two t, as D is proportional to ``F^(1-a)``; the former value where they are too near.

    Returns it and how far it can be trusted (see :func:`converged`). # [BM], [BM]
    """
    usable = (f > 0) & (former_f > 0)
    log_f = tl.log2(tl.where(usable, f, 1.0)) - tl.log2(tl.where(usable, former_f, 1.0))
    usable = usable & (tl.abs(log_f) > 0.02)
    log_d = tl.log2(tl.where(usable, d, 1.0)) - tl.log2(tl.where(usable, former_d, 1.0))
    secant = log_d / tl.where(usable, log_f, 1.0)
    return tl.where(usable, tl.minimum(tl.maximum(secant, 0.0), 4.0), flatness), tl.where(usable, 1.0, trust)


@triton.jit
def power_step(f, d, flatness, beta):
    """Step to ``F = 1`` from the sums at t, exact when F is a power of the distance to its zero ("power Newton")."""
    safe_d = tl.where(d > 0, d, 1.0)
    safe_f = tl.where(f > 0, f, 1.0)
    log_f = tl.log2(safe_f) * 0.6931471805599453
    y = tl.minimum(tl.maximum((1.0 - flatness) * log_f, -30.0), 30.0)
    flat = tl.abs(y) < 1.0e-3
    ratio = tl.where(flat, 1.0 - 0.5 * y, (1.0 - tl.exp2(y * -1.4426950408889634)) / tl.where(flat, 1.0, y))
    return tl.where(f > 0, safe_f / (beta * safe_d) * log_f * ratio, 0.0)


@triton.jit
def raise_bound(m, t, f, d, s, s_max, beta, KIND: tl.constexpr):
    """Account for one tile of scores in a row's lower bound of tau.

    Args:
        m, t: maximum and bound so far. # [BM]
        f, d: sums of ``(s - t)^beta`` and ``(s - t)^(beta - 1)`` over keys seen since t last moved. # [BM]
        s, s_max: the tile's scores and their row maxima. # [BM, BN], [BM]

    The threshold over a subset of the keys never exceeds the threshold over all, so a Newton step from the sums of any
    subset keeps t a lower bound.
    """
    m = tl.maximum(m, s_max)
    t_new = tl.maximum(t, m - 1.0)
    stay = t_new == t
    x = tl.maximum(s - t_new[:, None], 0.0)
    p, u = powers(x, beta, KIND)
    f = tl.where(stay, f, 0.0) + tl.sum(p, 1)
    d = tl.where(stay, d, 0.0) + tl.sum(u, 1)
    over = f > 1.0
    t_new = tl.where(over, t_new + newton_step(f, d, beta, KIND), t_new)
    return m, t_new, tl.where(over, 0.0, f), tl.where(over, 0.0, d)


@triton.jit
def converged(f, flatness, trust, beta, tolerance, KIND: tl.constexpr):
    """Whether one more step from these sums leaves ``|F^(1/beta) - 1|`` below 2^-8 (README, "stopping rule").

    The step is of third order where the weights spread like a power law; many scores just above the threshold, or
    beta < 1.5, slow it down. ``trust`` is the share of the tolerance that the quality of the flatness allows, at least
    a quarter.
    """
    regular = (flatness < 1.5) & (beta >= 1.5)
    slow = tl.where(beta >= 1.5, 0.25, 0.05)
    return tl.abs(root(f, beta, KIND) - 1.0) <= tolerance * tl.where(regular, tl.maximum(trust, slow), slow)


@triton.jit
def solve_step(t, lo, hi, f, d, flatness, beta, KIND: tl.constexpr):
    """One power Newton step towards ``F(tau) = 1`` from the sums at t, kept inside a bracket; new t and bracket."""
    lo = tl.maximum(lo, t + newton_step(f, d, beta, KIND))
    hi = tl.where(f <= 1.0, tl.minimum(hi, t), hi)
    t_new = tl.maximum(t + power_step(f, d, flatness, beta), lo)
    return tl.where(t_new >= hi, 0.5 * (lo + hi), t_new), lo, hi
