"""Launches that remember compiled kernels: Triton looks at each of 50 arguments, and at globals, in every launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from .tiling import INTERPRETED

# Elsewhere kernels are compiled for more than `launch` compares, or compiled kernels take other arguments.
_REMEMBERS = (
    not INTERPRETED
    and torch.version.hip is None
    and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
)
# Numbers below are passed in 32 bits.
_WIDE = 2**31
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    **constants: Any,
) -> None:
    """``kernel[grid](*tensors, *numbers, **constants)``, which takes the host a third as long from the second time on.

    Triton compiles a kernel for the dtypes of tensors, for which of them start at a multiple of 16 bytes, for which
    integers need 64 bits, and for constants (parameters and options). All but the third tell remembered kernels apart.

    Args:
        numbers: the integers among them are parameters that the kernel names in ``do_not_specialize``.
        constants: given in one order wherever the kernel is launched.
    """
    if not _REMEMBERS or max(numbers) >= _WIDE:
        kernel[grid](*tensors, *numbers, **constants)
        return
    device = driver.active.get_current_device()
    key = (
        kernel.fn,
        device,
        *[tensor if tensor is None else tensor.dtype for tensor in tensors],
        *[tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors],
        *constants.values(),
    )
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*tensors, *numbers, **constants)
        return
    # A compiled kernel has places for the constants, and does not look at them.
    places = (None,) * (len(kernel.arg_names) - len(tensors) - len(numbers))
    compiled[grid](*tensors, *numbers, *places, stream=driver.active.get_current_stream(device))
