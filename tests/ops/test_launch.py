"""When a remembered kernel is launched without Triton's look-up: a kernel and a driver that note their calls."""

import importlib.util
import weakref
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")

HALF, SINGLE = torch.zeros(8, dtype=torch.float16), torch.zeros(8)
OPTIONS = {"BM": 16, "num_warps": 4}


class Kernel:
    """Has two pointers, two numbers and one constant."""

    arg_names = ("X", "Y", "length", "scale", "BM")

    def __init__(self):
        self.fn = lambda: None
        self.looked_up, self.remembered = [], []

    def __getitem__(self, grid):
        def look_up(*arguments, **constants):
            self.looked_up.append((grid, arguments, constants))
            return Compiled(self)

        return look_up


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.kernel.remembered.append((grid, arguments, stream))


@pytest.fixture
def module(monkeypatch):
    from hf_sparse_attention.ops.triton import launch as module

    active = SimpleNamespace(device=0)
    active.get_current_device = lambda: active.device
    active.get_current_stream = lambda device: 100 + device
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(module, "_REMEMBERS", True)
    monkeypatch.setattr(module, "_compiled", {})
    return module


def test_the_second_launch_is_of_the_remembered_kernel(module):
    kernel = Kernel()
    module.launch(kernel, (3, 1, 1), (SINGLE, None), (7, 0.5), **OPTIONS)
    assert kernel.looked_up == [((3, 1, 1), (SINGLE, None, 7, 0.5), OPTIONS)]
    other = torch.ones(4)
    module.launch(kernel, (5, 2, 1), (other, None), (2**31 - 1, -1.5), **OPTIONS)
    assert len(kernel.looked_up) == 1
    assert kernel.remembered == [((5, 2, 1), (other, None, 2**31 - 1, -1.5, None), 100)]


@pytest.mark.parametrize(
    ("tensors", "numbers", "options"),
    [
        pytest.param((HALF, None), (7, 0.5), {}, id="dtype"),
        pytest.param((SINGLE, SINGLE), (7, 0.5), {}, id="tensor-for-none"),
        pytest.param((SINGLE[1:], None), (7, 0.5), {}, id="alignment"),
        pytest.param((SINGLE, None), (2**31, 0.5), {}, id="wide-integer"),
        pytest.param((SINGLE, None), (7, 0.5), {"BM": 32}, id="constant"),
        pytest.param((SINGLE, None), (7, 0.5), {"maxnreg": 128}, id="option"),
    ],
)
def test_what_triton_compiles_for_is_looked_up(module, tensors, numbers, options):
    kernel = Kernel()
    module.launch(kernel, (1, 1, 1), (SINGLE, None), (7, 0.5), **OPTIONS)
    module.launch(kernel, (1, 1, 1), tensors, numbers, **{**OPTIONS, **options})
    assert len(kernel.looked_up) == 2
    assert not kernel.remembered


def test_another_device_and_another_kernel_are_looked_up(module):
    first, second = Kernel(), Kernel()
    module.launch(first, (1, 1, 1), (SINGLE, None), (7, 0.5), **OPTIONS)
    module.launch(second, (1, 1, 1), (SINGLE, None), (7, 0.5), **OPTIONS)
    module.driver.active.device = 1
    module.launch(first, (1, 1, 1), (SINGLE, None), (7, 0.5), **OPTIONS)
    assert [len(kernel.looked_up) for kernel in (first, second)] == [2, 1]
    module.launch(first, (1, 1, 1), (SINGLE, None), (7, 0.5), **OPTIONS)
    assert [stream for *_, stream in first.remembered] == [101]


def test_nothing_keeps_the_tensors(module):
    kernel, tensor = Kernel(), torch.zeros(8)
    module.launch(kernel, (1, 1, 1), (tensor, None), (7, 0.5), **OPTIONS)
    kernel.looked_up.clear()
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is None


def test_integers_of_kernels_are_not_specialised():
    """Then an integer's value makes no other kernel, and remembered ones need not be told apart by it."""
    from hf_sparse_attention.ops.triton import operator

    kernels = [value for name, value in vars(operator).items() if name.endswith("_kernel")]
    assert len(kernels) >= 11
    for kernel in kernels:
        # Norms of keys alone are launched by Triton itself.
        if kernel is operator.key_norms_kernel:
            continue
        numbers = [p for p in kernel.params if p.name[0].islower() and not p.is_constexpr]
        floats = {"scale", "scaling", "alpha_minus_1", "beta", "unit", "tolerance"}
        assert {p.name for p in numbers if not p.do_not_specialize} <= floats
