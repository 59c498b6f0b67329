"""Inputs for operator tests, and what to compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention.ops import sparse_attention
from hf_sparse_attention.ops.reference import entmax_weights
from hf_sparse_attention.ops.visibility import alibi_positions, resolve_visibility

ALPHAS = (1.0, 1.01, 1.25, 1.5, 1.75, 2.0)
DIFFERENTIABLE = ("query", "key", "value", "query_scale", "slopes")


@dataclass
class Case:
    """Sizes of one call and its options; ``options`` holds tensors and flags that are not differentiated."""

    batch: int = 2
    query_heads: int = 2
    key_heads: int = 2
    query_length: int = 63
    key_length: int = 63
    head_dim: int = 16
    value_dim: int = 16
    extras: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Differentiable inputs and the gradient of the output, float64, rounded to bfloat16."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().double()

        tensors = {
            "query": 2 * normal(self.batch, self.query_heads, self.query_length, self.head_dim),
            "key": normal(self.batch, self.key_heads, self.key_length, self.head_dim),
            "value": normal(self.batch, self.key_heads, self.key_length, self.value_dim),
            "grad": normal(self.batch, self.query_heads, self.query_length, self.value_dim),
        }
        if "query_scale" in self.extras:
            tensors["query_scale"] = 1 + normal(self.batch, self.query_heads, self.query_length).abs()
        if "slopes" in self.extras:
            tensors["slopes"] = (1 / torch.arange(1, self.query_heads + 1)).bfloat16().double()
        return tensors


def _ranges(starts: list[int], ends: list[int], length: int) -> dict[str, Tensor]:
    return {
        "key_start": torch.tensor(starts)[:, None].expand(-1, length),
        "key_end": torch.tensor(ends, dtype=torch.int32)[:, None].expand(-1, length),
    }


def _mask(*shape: int, visible: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < visible


BOTH = ("query_scale", "slopes")
CASES = {
    "bidirectional": Case(head_dim=60, value_dim=33),
    "causal": Case(query_length=150, key_length=150, extras=BOTH, options={"is_causal": True}),
    "causal-gqa3-dim100": Case(query_heads=6, head_dim=100, extras=BOTH, options={"is_causal": True}),
    "gqa5-key-longer": Case(
        query_heads=5, key_heads=1, query_length=17, key_length=111, extras=BOTH, options={"is_causal": True}
    ),
    "gqa7-dim33": Case(query_heads=14, head_dim=33, value_dim=7, extras=("query_scale",), options={"is_causal": True}),
    "query-longer": Case(query_length=71, key_length=50, extras=BOTH, options={"is_causal": True}),
    "decode": Case(query_heads=6, query_length=1, key_length=97, extras=BOTH, options={"is_causal": True}),
    "left-padded": Case(
        batch=3, query_length=70, key_length=70, extras=BOTH,
        options={"is_causal": True, **_ranges([0, 13, 69], [70, 70, 70], 70)},
    ),
    "right-padded": Case(
        batch=3, query_length=70, key_length=70, extras=BOTH, options=_ranges([0, 0, 0], [70, 41, 1], 70)
    ),
    "packed": Case(
        batch=1, query_length=140, key_length=140, extras=BOTH,
        options={"is_causal": True, "cu_seqlens": torch.tensor([0, 3, 3, 67, 140], dtype=torch.int32)},
    ),
    "packed-bidirectional": Case(
        batch=1, query_length=140, key_length=140, options={"cu_seqlens": torch.tensor([0, 1, 99, 140])}
    ),
    "window": Case(
        query_length=150, key_length=150, extras=BOTH, options={"is_causal": True, "sliding_window": 11}
    ),
    "window-bidirectional": Case(query_length=90, key_length=101, extras=BOTH, options={"sliding_window": 20}),
    "mask": Case(options={"attention_mask": _mask(2, 1, 63, 63, visible=0.5)}, extras=BOTH),
    "mask-per-head-gqa": Case(query_heads=6, options={"attention_mask": _mask(6, 63, 63, visible=0.3)}),
    "mask-of-keys": Case(options={"attention_mask": _mask(2, 1, 1, 63, visible=0.7), "is_causal": True}),
    "mask-with-empty-rows": Case(options={"attention_mask": _mask(2, 2, 63, 63, visible=0.02)}, extras=BOTH),
    "positions": Case(
        extras=BOTH,
        options={
            "is_causal": True,
            "query_positions": torch.arange(63)[None] * 2 + 100,
            "key_positions": torch.arange(126).view(2, 63) + 90,
        },
    ),
}  # fmt: skip


def run(
    case: Case, impl: str, dtype: torch.dtype = torch.float64, device: str = "cpu", **options: Any
) -> dict[str, Tensor]:
    """Output and gradients, as float64 on the CPU, of one backend."""
    inputs = {name: tensor.to(device, dtype) for name, tensor in case.tensors().items()}
    grad = inputs.pop("grad")
    for tensor in inputs.values():
        tensor.requires_grad_()
    attend = _eager if impl == "eager" else sparse_attention
    arguments = {**inputs, **case.options, **options}
    arguments = {name: item.to(device) if isinstance(item, Tensor) else item for name, item in arguments.items()}
    output = attend(**arguments) if impl == "eager" else attend(**arguments, impl=impl)
    gradients = torch.autograd.grad(output, list(inputs.values()), grad)
    results = {"output": output, **dict(zip(inputs, gradients))}
    return {name: tensor.detach().cpu().double() for name, tensor in results.items()}


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float,
    query_scale: Tensor | None = None,
    slopes: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    top_k: int | None = None,
    **visibility: Any,
) -> Tensor:
    """What transformers' eager attention does: everything in the dtype of the inputs, only the weights in float32."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if query_scale is not None:
        scores = scores * query_scale[..., None]
    if slopes is not None:
        positions = alibi_positions(query.shape[2], key.shape[2], query_positions, key_positions, query.device)
        distance = (positions[0][:, :, None] - positions[1][:, None]).abs().to(query.dtype)
        scores = scores - slopes[:, None, None] * distance[:, None]
    visible = resolve_visibility(query, key, **visibility).dense(query, key)
    weights = entmax_weights(scores.float(), alpha, visible, top_k).to(query.dtype)
    return weights @ value


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Distance in the Euclidean norm, relative to ``expected``, or absolute if that is zero."""
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)
