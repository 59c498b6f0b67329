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
def power_step(f, d, c, beta):
    """Step to ``F = 1`` from the sums at t, exact when F is a power of the distance to its zero ("power Newton")."""
    safe_d = tl.where(d > 0, d, 1.0)
    safe_f = tl.where(f > 0, f, 1.0)
    a = 1.0 - (1.0 - 1.0 / beta) * safe_f * c / (safe_d * safe_d)
    log_f = tl.log2(safe_f) * 0.6931471805599453
    y = tl.minimum(tl.maximum(a * log_f, -30.0), 30.0)
    flat = tl.abs(y) < 1.0e-3
    ratio = tl.where(flat, 1.0 - 0.5 * y, (1.0 - tl.exp2(y * -1.4426950408889634)) / tl.where(flat, 1.0, y))
    return tl.where(f > 0, safe_f / (beta * safe_d) * log_f * ratio, 0.0)


@triton.jit
def bound_sums(f, d, m, t, step, beta, KIND: tl.constexpr):
    """A lower bound of F and an upper bound of D over the same keys after t grows by ``step >= 0``.

    ``F^(1/beta)`` is convex, so it stays above its tangent; ``(x - step) / x <= 1 - step / max(x)``.
    """
    r = root(f, beta, KIND)
    r = tl.maximum(r - step * d * r / tl.where(f > 0, f, 1.0), 0.0)
    f, _ = powers(r, beta, KIND)
    shrink = tl.maximum(1.0 - step / tl.maximum(m - t, 1.0e-30), 0.0)
    _, u = powers(shrink, beta, KIND)
    return f, d * u


@triton.jit
def model_sums(f, d, c, m, t, step, beta):
    """The sums over the same keys after t grows by ``step``, if F is a power of the distance to its zero."""
    some = (f > 0) & (step < m - t)
    safe_d = tl.where(d > 0, d, 1.0)
    safe_f = tl.where(f > 0, f, 1.0)
    a = 1.0 - (1.0 - 1.0 / beta) * safe_f * c / (safe_d * safe_d)
    a = tl.minimum(tl.maximum(a, 1.0e-3), 1.0 / beta)
    r = tl.maximum(1.0 - step * a * beta * safe_d / safe_f, 1.0e-20)
    log_r = tl.log2(r)
    f = tl.where(some, f * tl.exp2(log_r / a), 0.0)
    d = tl.where(some, d * tl.exp2(log_r * (1.0 / a - 1.0)), 0.0)
    return f, d, tl.where(some, c * tl.exp2(log_r * tl.maximum(1.0 / a - 2.0, 0.0)), 0.0)


@triton.jit
def raise_bound(m, t, at, f, d, f_model, d_model, c_model, s, s_max, beta, KIND: tl.constexpr):
    """Account for one tile of scores in a row's lower bound of tau. All arguments but s are per row. # [BM]

    Args:
        m, t: maximum, and lower bound of tau.
        at: where the sums are taken; t has moved one step beyond.
        f, d: lower bound of F and upper bound of D at ``at``, over the keys seen.
        f_model, d_model, c_model: estimates of F, D and C there, for the first guess of tau.
        s, s_max: the tile's scores and their row maxima. # [BM, BN], [BM]

    The threshold over a subset of the keys never exceeds the threshold over all, and a Newton step with F too small
    and D too large is too short: t stays a lower bound.
    """
    t_new = tl.maximum(t, s_max - 1.0)
    step = t_new - at
    # A Newton step from f > 1 ends where F is at least 1.
    stepped = (f > 1.0) & (t_new == t)
    f, d = bound_sums(f, d, m, at, step, beta, KIND)
    f = tl.where(stepped, tl.maximum(f, 1.0), f)
    f_model, d_model, c_model = model_sums(f_model, d_model, c_model, m, at, step, beta)
    m = tl.maximum(m, s_max)
    x = tl.maximum(s - t_new[:, None], 0.0)
    p, u = powers(x, beta, KIND)
    tile_f = tl.sum(p, 1)
    tile_d = tl.sum(u, 1)
    f += tile_f
    d += tile_d
    t = tl.where(f > 1.0, t_new + newton_step(f, d, beta, KIND), t_new)
    c_model += tl.sum(curvature(x, beta, KIND), 1)
    return m, t, t_new, f, d, f_model + tile_f, d_model + tile_d, c_model


@triton.jit
def converged(f, d, c, beta, tolerance, KIND: tl.constexpr):
    """Whether one more step from these sums leaves ``|F^(1/beta) - 1|`` below 2^-8 (README, "stopping rule").

    The step is of third order where the weights spread like a power law; many scores just above the threshold, or
    beta < 1.5, slow it down.
    """
    safe_d = tl.where(d > 0, d, 1.0)
    regular = (f * c < (3.0 * beta / tl.maximum(2.0 * (beta - 1.0), 1.0e-6)) * safe_d * safe_d) & (beta >= 1.5)
    slow = tl.where(beta >= 1.5, 0.25, 0.05)
    return tl.abs(root(f, beta, KIND) - 1.0) <= tolerance * tl.where(regular, 1.0, slow)


@triton.jit
def solve_step(t, lo, hi, f, d, c, beta, KIND: tl.constexpr):
    """One power Newton step towards ``F(tau) = 1`` from the sums at t, kept inside a bracket; new t and bracket."""
    lo = tl.maximum(lo, t + newton_step(f, d, beta, KIND))
    hi = tl.where(f <= 1.0, tl.minimum(hi, t), hi)
    t_new = tl.maximum(t + power_step(f, d, c, beta), lo)
    return tl.where(t_new >= hi, 0.5 * (lo + hi), t_new), lo, hi
