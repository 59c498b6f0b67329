"""Which backend computes a call."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from .visibility import Visibility

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(
    impl: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float,
    attention_mask: Tensor | None,
    key_positions: Tensor | None,
    top_k: int | None,
    dropout_p: float,
    return_weights: bool,
) -> str:
    """The name of the backend, "triton", "chunked" or "reference", for validated arguments of ``sparse_attention``.

    Raises:
        ValueError: ``impl`` names a backend that does not support the arguments.
    """
    if impl == "reference":
        return impl
    if impl == "chunked":
        if return_weights:
            raise ValueError(
                "return_weights is True with impl='chunked', which never holds the weights; "
                "allowed: impl='auto' or 'reference'."
            )
        return impl
    backend = "reference" if return_weights else "chunked"
    if impl == "auto" and not query.is_cuda:
        return backend
    reason = _triton_obstacle(
        query, key, value, alpha, attention_mask, key_positions, top_k, dropout_p, return_weights
    )
    if reason is None:
        return "triton"
    if impl == "triton":
        raise ValueError(
            f"impl is 'triton', but its kernels cannot compute this call: {reason}; allowed: impl='auto'."
        )
    if not torch.compiler.is_compiling():
        _warn_once(f"sparse_attention takes the slower {backend!r} path instead of the Triton kernels: {reason}.")
    return backend


def run_triton(query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, **arguments: Any) -> Tensor:
    """The Triton kernels, for arguments that :func:`choose_backend` gave to them."""
    from .triton import triton_attention

    key_start, key_end = visibility.ranges(query, key)
    return triton_attention(
        query,
        key,
        value,
        arguments["alpha"],
        arguments["scaling"],
        arguments["query_scale"],
        arguments["slopes"],
        key_start,
        key_end,
        arguments["query_positions"],
    )


def _triton_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float,
    attention_mask: Tensor | None,
    key_positions: Tensor | None,
    top_k: int | None,
    dropout_p: float,
    return_weights: bool,
) -> str | None:
    """Why the kernels cannot compute a call, or None."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    unsupported = {
        "return_weights": return_weights,
        "top_k": top_k is not None,
        "dropout_p": dropout_p > 0.0,
        "attention_mask": attention_mask is not None,
        "key_positions": key_positions is not None,
    }
    if any(unsupported.values()):
        return "they do not support " + ", ".join(name for name, given in unsupported.items() if given)
    from .triton import unsupported_reason

    return unsupported_reason(query, key, value, alpha)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
