"""``python -m hf_sparse_attention``: versions, backends, a check of the kernels, and what this machine would use.

The exit status is 1 if a backend that is available fails its check, else 0.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .ops import sparse_attention
from .ops.dispatch import choose_backend
from .ops.precision import multiplies_in_tf32

PACKAGES = ("torch", "transformers", "triton", "entmax")
BACKENDS = ("triton", "chunked", "reference")
# Softmax, the two closed forms, and the general exponent: each has code of its own.
ALPHAS = (1.0, 1.25, 1.5, 2.0)
# Allowed error relative to the largest entry. TF32 products, a global setting of PyTorch, have 10 bits.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
_TF32_TOLERANCE = 1e-2
_KEY_DIM = 24
# Few keys with values as wide as keys go to a Triton kernel of their own.
_VALUE_DIMS = (16, _KEY_DIM)


@dataclass(frozen=True)
class Check:
    """Errors of one backend at one alpha against the float64 reference; ``problem`` if it did not run."""

    backend: str
    dtype: torch.dtype
    alpha: float
    tolerance: float
    output: float = math.inf
    gradients: float = math.inf
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.output <= self.tolerance and self.gradients <= self.tolerance


def main() -> int:
    """Print everything; returns the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"hf_sparse_attention {__version__}")
    for name, version in versions().items():
        print(f"  {name:<14}{version or 'not installed'}")
    print(f"  {'python':<14}{platform.python_version()}")
    print(f"  {'device':<14}{_describe_device(device)}")

    print("\nBackends")
    for backend in BACKENDS:
        reason = obstacle(backend, device)
        print(f"  {backend:<14}{'available' if reason is None else f'not available: {reason}'}")

    print("\nSelf-check against the float64 reference: largest errors, relative")
    print(f"  {'backend':<14}{'dtype':<10}{'alpha':<7}{'output':<9}{'gradients':<11}allowed")
    checks = [
        self_check(backend, dtype, alpha, device)
        for backend in BACKENDS
        for dtype in TOLERANCES
        if obstacle(backend, device, dtype) is None
        for alpha in ALPHAS
    ]
    for check in checks:
        start = f"  {check.backend:<14}{str(check.dtype).removeprefix('torch.'):<10}{check.alpha:<7g}"
        figures = check.problem or f"{check.output:<9.1e}{check.gradients:<11.1e}{check.tolerance:<9.0e}"
        print(f"{start}{figures} {'pass' if check.passed else 'FAIL'}")

    print('\nWith impl="auto" this machine uses')
    for use, arguments in {
        "training, generation": {},
        "returned weights": {"return_weights": True},
        "masks with holes": {"has_mask": True},
        "attention dropout": {"dropout_p": 0.1},
    }.items():
        print(f"  {use:<24}{automatic(device, **arguments)}")
    return 0 if all(check.passed for check in checks) else 1


def versions() -> dict[str, str | None]:
    """Versions of the packages that the results depend on; None for those that are not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def obstacle(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot run on ``device``, or None."""
    try:
        _choose(backend, device, dtype)
    except ValueError as error:
        return _reason(str(error).rpartition("; allowed")[0])
    except Exception:  # an installation that is broken: the self-check shows how
        return None
    return None


def self_check(backend: str, dtype: torch.dtype, alpha: float, device: torch.device) -> Check:
    """Output and gradients of causal attention with ALiBi, a length scale and grouped heads, on tiny odd inputs."""
    tolerance = TOLERANCES[dtype]
    if device.type == "cuda" and multiplies_in_tf32():
        tolerance = max(tolerance, _TF32_TOLERANCE)
    outputs, gradients = [], []
    for value_dim in _VALUE_DIMS:
        inputs = _inputs(device, dtype, value_dim)
        expected = _attend("reference", alpha, *(tensor.double() for tensor in inputs))
        try:
            found = _attend(backend, alpha, *inputs)
        except Exception as error:  # a kernel that does not compile must not hide the other checks
            return Check(backend, dtype, alpha, tolerance, problem=f"did not run: {_first_line(error)}")
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected)]
        # A NaN would get lost in max().
        output, *others = (math.inf if math.isnan(error) else error for error in errors)
        outputs.append(output)
        gradients += others
    return Check(backend, dtype, alpha, tolerance, max(outputs), max(gradients))


def automatic(device: torch.device, **arguments: Any) -> str:
    """The backend that ``impl="auto"`` takes, and why, where it is not the fastest one of the device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            backend = _choose("auto", device, dtype, **arguments)
        except Exception as error:
            return f"nothing, it fails: {_first_line(error)}"
    return f"{backend}: {_reason(str(caught[0].message).rstrip('.'))}" if caught else backend


def _reason(message: str) -> str:
    """What a message of the dispatcher says after its colon, in a sentence of its own."""
    reason = message.partition(": ")[2]
    return f"the Triton kernels {reason[5:]}" if reason.startswith("they ") else reason


def _choose(impl: str, device: torch.device, dtype: torch.dtype, has_mask: bool = False, **arguments: Any) -> str:
    query, key, value = _inputs(device, dtype)[:3]
    mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=device) if has_mask else None
    call = {"alpha": 1.5, "key_positions": None, "top_k": None, "dropout_p": 0.0, "return_weights": False}
    return choose_backend(impl, query, key, value, attention_mask=mask, **{**call, **arguments})


def _inputs(device: torch.device, dtype: torch.dtype, value_dim: int = _VALUE_DIMS[0]) -> tuple[Tensor, ...]:
    """Query, key, value, query_scale and slopes, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 37, _KEY_DIM), (2, 2, 37, _KEY_DIM), (2, 2, 37, value_dim)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    scale = 1.0 + torch.rand(2, 4, 37, generator=generator)
    slopes = torch.tensor([1.0, 0.5, 0.0, 0.0])
    return tuple(tensor.to(device) for tensor in (query, key, value, scale, slopes))


def _attend(impl: str, alpha: float, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients, float64."""
    query, key, value, scale = (tensor.detach().requires_grad_() for tensor in inputs[:4])
    output = sparse_attention(
        query, key, value, alpha=alpha, query_scale=scale, slopes=inputs[4], is_causal=True, impl=impl
    )
    # Its gradient differs from entry to entry and is exact in bfloat16.
    factors = torch.arange(output.numel(), device=output.device, dtype=torch.float64).cos()
    factors = factors.to(torch.bfloat16).double().view(output.shape)
    gradients = torch.autograd.grad((output.double() * factors).sum(), (query, key, value, scale))
    return [tensor.double() for tensor in (output.detach(), *gradients)]


def _describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
