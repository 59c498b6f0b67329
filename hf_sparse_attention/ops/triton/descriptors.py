"""Tensor descriptors, by which Hopper's copy engine (TMA) reads tiles: where the backward uses them."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

# The code of earlier versions was not measured.
_TRITON_IS_OLD = TensorDescriptor is None or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
_HEAD_DIMS = (64, 128)
# Pairs of a query and a key, over all heads (16 heads of 4096 tokens): from here on the kernels save more than the
# ten or twenty microseconds in which the host makes descriptors.
_MIN_PAIRS = 2**28


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def descriptor_obstacle(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> str | None:
    """Why the backward reads these tensors through pointers, or None where descriptors are possible and faster.

    Args:
        query, grad: (B, Hq, Lq, D) and (B, Hq, Lq, Dv), as the kernels read them: see ``geometry.aligned``.
        key, value: (B, Hk, Lk, D) and (B, Hk, Lk, Dv), likewise.
    """
    if _TRITON_IS_OLD:
        return f"Triton {triton.__version__} is older than 3.6"
    if query.dtype == torch.float32:
        return "products of float32 take longer than reading"
    if query.shape[3] != value.shape[3] or query.shape[3] not in _HEAD_DIMS:
        return f"head dimensions are {query.shape[3]} and {value.shape[3]}, not both 64 or both 128"
    if query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] < _MIN_PAIRS:
        return f"fewer than {_MIN_PAIRS} pairs of queries and keys do not pay for making descriptors"
    if any(0 in tensor.stride() for tensor in (query, key, value, grad)):
        return "a tensor is expanded, and the copy engine takes no stride of 0"
    if not query.is_cuda or not _is_hopper(query.device):
        return f"{query.device} is no GPU of compute capability 9 (Hopper), on which alone it was measured"
    return None


def descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Reads tiles of ``rows`` rows of one head of a (B, H, L, D) tensor that :func:`descriptor_obstacle` allows.

    It is a parameter of the launch: nothing is allocated, and CUDA graphs capture it.
    """
    # A dimension of size 1 may have any stride in PyTorch, but not here.
    strides = [stride if size > 1 else tensor.shape[3] for size, stride in zip(tensor.shape, tensor.stride())]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:3], 1], [1, 1, rows, tensor.shape[3]])
