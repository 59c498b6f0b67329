"""Inputs, visible ranges and the comparison shared by the tests of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attention.ops.reference import entmax_weights
from hf_sparse_attention.ops.triton import triton_attention


@dataclass(frozen=True)
class Case:
    """One problem; ``scores`` names how its scores are distributed and ``ranges`` what each query sees."""

    q_len: int = 70
    k_len: int = 70
    q_heads: int = 2
    k_heads: int = 1
    head_dim: int = 16
    value_dim: int | None = None
    batch: int = 1
    alpha: float = 1.5
    dtype: torch.dtype = torch.float32
    scores: str = "normal"
    ranges: str = "causal"
    scale: bool = False
    slopes: bool = False
    positions: bool = False

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.value_dim is None else f"{self.head_dim}:{self.value_dim}"
        shape = f"{self.batch}x{self.q_heads}:{self.k_heads}x{self.q_len}:{self.k_len}x{dims}"
        flags = [name for name in ("scale", "slopes", "positions") if getattr(self, name)]
        return "-".join([shape, f"a{self.alpha:g}", str(self.dtype)[6:], self.scores, self.ranges, *flags])


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    query_scale: Tensor | None
    slopes: Tensor | None
    key_start: Tensor
    key_end: Tensor
    query_positions: Tensor | None
    grad: Tensor

    def differentiable(self) -> list[Tensor]:
        found = (self.query, self.key, self.value, self.query_scale, self.slopes)
        return [tensor for tensor in found if tensor is not None]


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    value_dim = case.value_dim or case.head_dim
    # Stored as projections store them, so that the kernels see strides other than contiguous ones.
    query = normal(case.batch, case.q_len, case.q_heads, case.head_dim).transpose(1, 2)
    key = normal(case.batch, case.k_len, case.k_heads, case.head_dim).transpose(1, 2)
    value = normal(case.batch, case.k_len, case.k_heads, value_dim).transpose(1, 2)
    if case.scores == "sharp":
        query = query * 4
    elif case.scores == "heavy":
        key = key / normal(*key.shape[:3], 1).abs().clamp(min=0.05)
    elif case.scores == "tied":
        query, key = query.sign(), key.sign()
    elif case.scores == "equal":
        key = torch.ones_like(key)
    elif case.scores == "huge":
        query, key = query * 100, key * 100
    elif case.scores == "needle":
        key = key * 0.1
        key[:, :, case.k_len // 3] = (
            8 * query[:, : case.k_heads, -1] / query[:, : case.k_heads, -1].norm(dim=-1, keepdim=True)
        )
    elif case.scores != "normal":
        raise ValueError(f"unknown scores {case.scores!r}")
    start, end = make_ranges(case, generator)
    slopes = (1.0 / torch.arange(1, case.q_heads + 1)) if case.slopes else None
    if slopes is not None and case.q_heads > 1:
        slopes[case.q_heads // 2] = 0.0
    positions = torch.arange(case.q_len)[None] + case.k_len - case.q_len + 3 if case.positions else None

    def ready(tensor: Tensor, dtype: torch.dtype = case.dtype) -> Tensor:
        return tensor.to(device, dtype).requires_grad_()

    return Inputs(
        ready(query),
        ready(key),
        ready(value),
        ready(normal(case.batch, case.q_heads, case.q_len), torch.float32) if case.scale else None,
        ready(slopes, torch.float32) if case.slopes else None,
        start.to(device, torch.int32),
        end.to(device, torch.int32),
        None if positions is None else positions.to(device),
        normal(case.batch, case.q_heads, case.q_len, value_dim).to(device, case.dtype),
    )


def make_ranges(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    own = torch.arange(case.q_len)[None] + case.k_len - case.q_len
    nothing, everything = torch.zeros_like(own), torch.full_like(own, case.k_len)
    if case.ranges == "causal":
        return nothing, own + 1
    if case.ranges == "full":
        return nothing, everything
    if case.ranges == "window":
        return (own - case.k_len // 4).clamp(min=0), own + 1
    if case.ranges == "packed":
        document = own * 3 // case.k_len
        length = -(-case.k_len // 3)
        return document * length, torch.minimum(own + 1, (document + 1) * length)
    if case.ranges == "padded":
        padding = torch.arange(case.batch)[:, None] * (case.k_len // 3)
        # A start per sequence, one end for all.
        return padding + nothing, own + 1
    if case.ranges == "holes":
        # Rows that see nothing at all, one key, or a random stretch.
        low = torch.randint(0, case.k_len, own.shape, generator=generator)
        high = torch.randint(0, case.k_len + 1, own.shape, generator=generator)
        high = torch.where(own % 7 == 0, low + 1, high)
        return low, torch.where(own % 5 == 0, low, high)
    raise ValueError(f"unknown ranges {case.ranges!r}")


def run_forward(case: Case, inputs: Inputs) -> Tensor:
    return triton_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        case.alpha,
        case.head_dim**-0.5,
        inputs.query_scale,
        inputs.slopes,
        inputs.key_start,
        inputs.key_end,
        inputs.query_positions,
    )


def run_kernels(case: Case, inputs: Inputs) -> list[Tensor]:
    """Output and gradients of every differentiable input."""
    output = run_forward(case, inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs.differentiable(), inputs.grad)]


def run_dense(case: Case, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The same with dense weights: products in ``dtype``, scores and weights in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = (t.to(dtype) for t in (inputs.query, inputs.key, inputs.value))
    group = case.q_heads // case.k_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.mT).to(wide) * case.head_dim**-0.5
    if inputs.query_scale is not None:
        scores = scores * inputs.query_scale.to(wide)[..., None]
    keys = torch.arange(case.k_len, device=query.device)
    if inputs.slopes is not None:
        positions = inputs.query_positions
        if positions is None:
            positions = torch.arange(case.q_len, device=query.device)[None] + case.k_len - case.q_len
        distance = (positions[..., None] - keys).abs().to(wide)
        scores = scores - inputs.slopes.to(wide)[:, None, None] * distance[:, None]
    visible = ((keys >= inputs.key_start[..., None]) & (keys < inputs.key_end[..., None]))[:, None]
    output = entmax_weights(scores, case.alpha, visible).to(dtype) @ value
    return [output.detach(), *torch.autograd.grad(output, inputs.differentiable(), inputs.grad.to(dtype))]


def check_against_dense(case: Case, device: str = "cpu", seed: int = 0) -> None:
    """Kernels are at most twice as far from float64 as dense attention in the same dtype, plus a floor."""
    inputs = make_inputs(case, device, seed)
    exact = run_dense(case, inputs, torch.float64)
    found = run_kernels(case, inputs)
    eager = run_dense(case, inputs, case.dtype)
    floor = error_floor(case)
    # Gradients that cancel to nothing are measured against the size of their terms.
    grad = 0.1 * inputs.grad.float().norm()
    terms = [0.0 * grad, grad * inputs.key.float().abs().mean(), grad * inputs.query.float().abs().mean(), grad]
    names = ["output", "query", "key", "value"]
    for name, tensor in (("query_scale", inputs.query_scale), ("slopes", inputs.slopes)):
        if tensor is not None:
            names.append(name)
            terms.append(grad)
    if case.alpha == 2.0 and case.scores == "tied":
        # Whole groups of scores lie on the threshold, where sparsemax has no derivative.
        names = names[:1]
    for name, size, mine, dense, truth in zip(names, terms, found, eager, exact):
        error, allowed = (mine.double() - truth).norm(), 2 * (dense.double() - truth).norm()
        allowed = allowed + floor * torch.maximum(truth.norm(), size)
        assert error <= allowed, f"{name} of {case}: error {error:.2e}, allowed {allowed:.2e}, norm {truth.norm():.2e}"


def error_floor(case: Case) -> float:
    """Relative error that no comparison sees below."""
    floor = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[case.dtype]
    # Scores of 1e4 carry an error of 1e-3 in float32, whichever way they are summed.
    return max(floor, 4e-3) if case.scores == "huge" else floor


def check_decode_against_dense(case: Case, device: str = "cpu", seed: int = 0) -> None:
    inputs = make_inputs(case, device, seed)
    exact = run_dense(case, inputs, torch.float64)[0]
    with torch.no_grad():
        found = run_forward(case, inputs)
    eager = run_dense(case, inputs, case.dtype)[0]
    error, dense = (found.double() - exact).norm(), (eager.double() - exact).norm()
    allowed = 2 * dense + error_floor(case) * exact.norm()
    assert error <= allowed, f"{case}: error {error:.2e}, allowed {allowed:.2e}, norm {exact.norm():.2e}"
