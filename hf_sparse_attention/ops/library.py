"""The chunked path as two ``torch.library`` operators, opaque to compilers and exporters, with fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chunked import ChunkedAttention, empty_output
from .visibility import Visibility

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, float alpha, float scaling, Tensor? query_scale, Tensor? slopes, "
    "Tensor? key_start, Tensor? key_end, Tensor? attention_mask, Tensor? query_positions, Tensor? key_positions, "
    "int? top_k, float dropout_p, Tensor? seed"
)


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float,
    scaling: float,
    query_scale: Tensor | None,
    slopes: Tensor | None,
    visibility: Visibility,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    top_k: int | None,
    dropout_p: float,
) -> Tensor:
    """Attention by the chunked path, (B, Hq, Lq, Dv); arguments as in ``sparse_attention``, already validated."""
    # Drawn from the generator that torch.manual_seed and checkpointing control.
    seed = torch.randint(2**62, (1,), dtype=torch.int64) if dropout_p > 0.0 else None
    output, _ = _forward(
        query,
        key,
        value,
        alpha,
        scaling,
        query_scale,
        slopes,
        *visibility,
        query_positions,
        key_positions,
        top_k,
        dropout_p,
        seed,
    )
    return output


@torch.library.custom_op(
    "hf_sparse_attention::chunked_attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(arguments[0].device.type, enabled=False):
        return ChunkedAttention(*arguments).forward()


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return empty_output(query, value), query.new_empty(3, *query.shape[:3], dtype=dtype)


@torch.library.custom_op(
    "hf_sparse_attention::chunked_attention_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_output, Tensor statistics, bool needs_query_scale, bool needs_slopes, {_ARGUMENTS}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward(
    grad_output: Tensor, statistics: Tensor, needs_query_scale: bool, needs_slopes: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, query_scale and slopes; the last two are empty where not needed."""
    with torch.autocast(grad_output.device.type, enabled=False):
        gradients = ChunkedAttention(*arguments).backward(grad_output, statistics, needs_query_scale, needs_slopes)
    return tuple(grad_output.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_backward.register_fake
def _(grad_output: Tensor, statistics: Tensor, needs_query_scale: bool, needs_slopes: bool, *arguments: Any):
    query, key, value, _, _, query_scale, slopes, *_ = arguments
    return (
        *(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)),
        *(
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else grad_output.new_empty(0)
            for tensor, needed in ((query_scale, needs_query_scale), (slopes, needs_slopes))
        ),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple:
    *tensors, statistics = ctx.saved_tensors
    remaining = iter(tensors)
    inputs = [next(remaining) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others)]
    needed = [ctx.needs_input_grad[index] for index in (5, 6)]
    gradients = list(_backward(grad_output, statistics, *needed, *inputs))
    result: list[Tensor | None] = [None] * len(inputs)
    result[:3] = gradients[:3]
    for index, need, gradient in zip((5, 6), needed, gradients[3:]):
        result[index] = gradient if need else None
    return tuple(result)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _refuse_second_derivatives(*_: Any) -> None:
    raise NotImplementedError("sparse_attention has second derivatives with impl='reference' only.")


_backward.register_autograd(_refuse_second_derivatives)
