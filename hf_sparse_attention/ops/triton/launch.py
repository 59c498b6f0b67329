"""Launches without Triton's own treatment of arguments, which takes Python longer than the kernels take the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from .tiling import INTERPRETED

# Since this release a compiled kernel takes all arguments of its function, compile-time values included.
_DIRECT = not INTERPRETED and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
_LARGEST_INT32 = 2**31 - 1


class Launched:
    """Decorator of a ``triton.jit`` function whose tensors come first, then its numbers, by position.

    Integers must be in ``do_not_specialize``: their values are not looked at. Compile-time values and options come by
    keyword, in one order. The first call with new dtypes, alignments or compile-time values goes through Triton; the
    compiled kernel that it returns serves the others.
    """

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.compiled: dict[tuple, tuple[Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> functools.partial:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """One launch on the current stream of the device of the first tensor."""
        if not _DIRECT:
            self.function[grid](*arguments, **constants)
            return
        device, current = arguments[0].get_device(), torch.cuda.current_device()
        if device != current:
            with torch.cuda.device(device):
                self.launch(grid, *arguments, **constants)
            return
        values: list[Any] = []
        dtypes = []
        misaligned = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                pointer = argument.data_ptr()
                dtypes.append(argument.dtype)
                if pointer % 16:
                    misaligned.append(len(values))
                values.append(pointer)
            else:
                values.append(argument)
                if argument is None:
                    dtypes.append(None)
        wide = max(values[len(dtypes) :], default=0) > _LARGEST_INT32
        key = (device, *dtypes, *misaligned, *constants.values())
        if wide or key not in self.compiled:
            kernel = self.function[grid](*arguments, **constants)
            if not wide and isinstance(kernel, CompiledKernel):
                names = self.function.arg_names[len(arguments) :]
                self.compiled[key] = kernel, [constants[name] for name in names]
            return
        kernel, rest = self.compiled[key]
        kernel[(*grid, 1, 1)[:3]](*values, *rest)
