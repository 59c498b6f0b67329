"""The public operator: checks its arguments, resolves what each query sees, and hands over to a backend."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .dispatch import choose_backend, run_triton
from .library import chunked_attention
from .reference import reference_attention
from .visibility import resolve_visibility

_LARGEST = sys.float_info.max
_BELOW_ONE = math.nextafter(1.0, 0.0)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float = 1.5,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    slopes: Tensor | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    top_k: int | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """alpha-entmax attention (arXiv 2506.16640): ``output_i = sum_j p_ij value_j``, ``p_i = alpha-entmax(z_i)``.

    ``z_ij = (query_i . key_j) * scaling * query_scale_i - slope_h * |query_position_i - key_position_j|`` over the
    keys that query i sees. A query that sees no key gives zeros, and zero gradients.

    Args:
        query: (B, Hq, Lq, D), float16, bfloat16, float32 or float64; D is at least 1.
        key: (B, Hk, Lk, D), same dtype; Hq is a multiple of Hk, each key head serves Hq / Hk neighbouring query heads.
        value: (B, Hk, Lk, Dv), same dtype; Dv is at least 1.
        alpha: entmax exponent in [1, 2]: 1 is softmax, 2 sparsemax.
        scaling: factor of the scores, default ``D ** -0.5``.
        query_scale: (B, Hq, Lq), factor of each query's scores: the length scale t of the paper.
        slopes: (Hq,), ALiBi slope of each query head (arXiv 2108.12409).
        is_causal: query i sees keys ``j <= i + Lk - Lq`` only.
        sliding_window: with ``position = i + Lk - Lq``, query i sees keys with ``position - j < sliding_window`` if
            causal, ``|position - j| < sliding_window`` otherwise.
        attention_mask: bool, broadcastable to (B, Hq, Lq, Lk), True where visible.
        cu_seqlens: int (documents + 1,), for B = 1 and Lq = Lk: document d holds the tokens ``cu_seqlens[d]`` to
            ``cu_seqlens[d + 1] - 1``; documents do not see each other. Values are looked at on the CPU only:
            elsewhere that would wait for the device.
        key_start: int (B or 1, Lq), first key that each query sees.
        key_end: int (B or 1, Lq), one past the last key that each query sees.
        query_positions: int (B or 1, Lq), positions for the ALiBi distance, within int32; default ``i + Lk - Lq``.
        key_positions: int (B or 1, Lk), positions for the ALiBi distance, within int32; default ``j``.
        top_k: softmax over the largest ``top_k`` visible scores (ties with the last one kept); needs ``alpha=1``.
        dropout_p: probability of dropping a weight, in [0, 1).
        return_weights: also return the weights; computed densely.
        impl: backend. "auto" takes the fastest one that supports the arguments, and says why (once) when that is not
            Triton on a CUDA device. Another backend that does not support the arguments is an error.

    Under autocast, query, key and value are cast to its dtype, as for PyTorch's own attention.

    All conditions on visibility hold together. Keys and values that no query sees must be finite too: 0 * NaN is NaN.

    Second derivatives and gradients by ``torch.func`` need ``impl="reference"``, forward mode ``alpha=1`` as well.

    Returns:
        (B, Hq, Lq, Dv) in the dtype of ``query``; with ``return_weights`` a pair with the weights (B, Hq, Lq, Lk).

    Raises:
        ValueError: an argument has a value, shape, dtype or device that is not allowed; the message names it.
        TypeError: an argument has the wrong type.
        NotImplementedError: an argument has a forward-mode tangent, of which the backend has no derivative.
    """
    query, key, value = _autocast(query, key, value)
    _check_tensors(query, key, value)
    alpha = _check_number("alpha", alpha, 1.0, 2.0, "a number in [1, 2]")
    dropout_p = _check_number("dropout_p", dropout_p, 0.0, _BELOW_ONE, "a number in [0, 1)")
    if scaling is None:
        scaling = query.shape[3] ** -0.5
    else:
        scaling = _check_number("scaling", scaling, -_LARGEST, _LARGEST, "a finite number, or None")
    _check_count("sliding_window", sliding_window)
    _check_count("top_k", top_k)
    if top_k is not None and alpha != 1.0:
        raise ValueError(f"alpha is {alpha} with top_k={top_k}; allowed: alpha=1, top_k is a softmax.")
    for name, flag in (("is_causal", is_causal), ("return_weights", return_weights)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}: {flag!r}.")
    _check_optional_tensors(
        query, key, query_scale, slopes, attention_mask, cu_seqlens, key_start, key_end, query_positions, key_positions
    )
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; allowed: {', '.join(IMPLEMENTATIONS)}.")

    if attention_mask is not None:
        attention_mask = attention_mask[(None,) * (4 - attention_mask.dim())]
    backend = choose_backend(
        impl,
        query,
        key,
        value,
        alpha=alpha,
        attention_mask=attention_mask,
        key_positions=key_positions,
        top_k=top_k,
        dropout_p=dropout_p,
        return_weights=return_weights,
    )
    visibility = resolve_visibility(
        query,
        key,
        is_causal=is_causal,
        sliding_window=sliding_window,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        key_start=key_start,
        key_end=key_end,
        # The Triton kernels clamp what they read: up to two launches less.
        clamp=backend != "triton",
    )
    arguments: dict[str, Any] = {
        "alpha": alpha,
        "scaling": scaling,
        "query_scale": query_scale,
        "slopes": slopes,
        "visibility": visibility,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "top_k": top_k,
        "dropout_p": dropout_p,
    }
    if backend == "reference":
        # Autocast would round the products that the reference takes in float32.
        with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
            output, weights = reference_attention(query, key, value, **arguments)
        return (output, weights) if return_weights else output
    _check_no_tangents(backend, query, key, value, query_scale, slopes)
    if backend == "triton":
        return run_triton(query, key, value, **arguments)
    return chunked_attention(query, key, value, **arguments)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, if it is enabled and they are of the kind that it casts."""
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        return tensors
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        if tensor.is_nested or tensor.layout != torch.strided:
            raise ValueError(f"{name} is nested or sparse; allowed: dense, with packed documents in cu_seqlens.")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: (batch, heads, length, head_dim).")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: float16, bfloat16, float32 and float64.")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: that of query, {query.dtype}.")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: the device of query, {query.device}.")
    batch, query_heads, _, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key has shape {_shape(key)}; allowed: ({batch}, heads, length, {head_dim}) as query.")
    if key.shape[1] == 0 or query_heads % key.shape[1] != 0:
        raise ValueError(f"key has {key.shape[1]} heads; allowed: a divisor of the {query_heads} heads of query.")
    if value.shape[:3] != key.shape[:3] or value.shape[3] == 0:
        allowed = f"{_shape(key.shape[:3])[:-1]}, at least 1)"
        raise ValueError(f"value has shape {_shape(value)}; allowed: {allowed}, the first three as key.")
    if head_dim == 0:
        raise ValueError(f"query has shape {_shape(query)}; allowed: a head_dim of at least 1.")


def _check_optional_tensors(
    query: Tensor,
    key: Tensor,
    query_scale: Tensor | None,
    slopes: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> None:
    batch, query_heads, query_length, _ = query.shape
    key_length = key.shape[2]

    for name, tensor, shape in (
        ("query_scale", query_scale, (batch, query_heads, query_length)),
        ("slopes", slopes, (query_heads,)),
    ):
        if tensor is not None:
            _check_tensor(name, tensor, query)
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: float16, bfloat16, float32 and float64.")
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: {_shape(shape)}.")

    for name, tensor, length in (
        ("key_start", key_start, query_length),
        ("key_end", key_end, query_length),
        ("query_positions", query_positions, query_length),
        ("key_positions", key_positions, key_length),
    ):
        if tensor is not None:
            _check_tensor(name, tensor, query)
            _check_integers(name, tensor)
            if tensor.dim() != 2 or (tensor.shape[0] != 1 and tensor.shape[0] != batch) or tensor.shape[1] != length:
                allowed = _shape((1, length)) if batch == 1 else f"{_shape((batch, length))} or {_shape((1, length))}"
                raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: {allowed}.")
    for name, tensor in (("query_positions", query_positions), ("key_positions", key_positions)):
        if tensor is not None and slopes is None:
            raise ValueError(f"{name} is given without slopes; it is used for the ALiBi distance only.")

    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask, query)
        if attention_mask.dtype != torch.bool:
            raise ValueError(
                f"attention_mask has dtype {attention_mask.dtype}; allowed: torch.bool, True where visible."
            )
        full = (batch, query_heads, query_length, key_length)
        sizes = tuple(attention_mask.shape)
        # Compared one by one: torch.compile gets `in` wrong for symbolic sizes.
        if len(sizes) > 4 or any(s != 1 and s != limit for s, limit in zip(sizes[::-1], full[::-1])):
            raise ValueError(
                f"attention_mask has shape {_shape(attention_mask)}; allowed: broadcastable to {_shape(full)}."
            )

    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, query, key)


def _check_cu_seqlens(cu_seqlens: Tensor, query: Tensor, key: Tensor) -> None:
    _check_tensor("cu_seqlens", cu_seqlens, query)
    _check_integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {_shape(cu_seqlens)}; allowed: (documents + 1,).")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"cu_seqlens is given with query {_shape(query)} and key {_shape(key)}; "
            "allowed: a batch of 1 and equal query and key lengths."
        )
    # Reading values would stall an accelerator, cannot be traced, and fake tensors have none.
    if cu_seqlens.device.type == "cpu" and type(cu_seqlens) is Tensor and not torch.compiler.is_compiling():
        ascending = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
        if not ascending or cu_seqlens[0] != 0 or cu_seqlens[-1] != query.shape[2]:
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.tolist()}; allowed: ascending from 0 to the length {query.shape[2]}."
            )


def _check_tensor(name: str, tensor: Any, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(tensor).__name__}.")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: the device of query, {query.device}.")


def _check_no_tangents(backend: str, *tensors: Tensor | None) -> None:
    """Forward-mode derivatives would be zero without a word: operators drop tangents."""
    if torch.compiler.is_compiling():
        return
    if any(tensor is not None and unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"impl={backend!r} has no forward-mode derivative; use reverse mode, or impl='reference' with alpha=1."
        )


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: torch.int32 or torch.int64.")


def _check_number(name: str, value: Any, low: float, high: float, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}: {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}.")
    return float(value)


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least 1 or None, got {type(value).__name__}: {value!r}.")
    if value < 1:
        raise ValueError(f"{name} is {value}; allowed: an integer of at least 1, or None.")


def _shape(tensor: Any) -> str:
    sizes = tensor.shape if isinstance(tensor, Tensor) else tensor
    return str(tuple(sizes))
