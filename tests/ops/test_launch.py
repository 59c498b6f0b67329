"""Which launches go through Triton, and what a compiled kernel is given; with a kernel that only takes notes."""

import importlib.util
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux", reason="needs the package triton"
)


class Notes:
    """Stands for a ``triton.jit`` function; the compiled kernels that it returns write down what they are given."""

    arg_names = ("A", "B", "count", "factor", "WIDTH", "TRAINING")

    def __init__(self):
        self.compilations, self.launches, self.finished = 0, [], True

    def __getitem__(self, grid):
        from triton.compiler import CompiledKernel

        class Compiled(CompiledKernel):
            module = None

            def __init__(self):
                pass

            def __getitem__(own, launched):
                assert launched == (*grid, 1, 1)[:3]
                return lambda *given: self.launches.append(given)

        def through_triton(*arguments, **constants):
            self.compilations += 1
            return Compiled() if self.finished else None

        return through_triton


@pytest.fixture
def notes(monkeypatch):
    from hf_sparse_attention.ops.triton import launch

    monkeypatch.setattr(launch, "_DIRECT", True)
    # The device that tensors on the CPU name.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    function = Notes()
    return function, launch.Launched(function)


def run(kernel, *arguments, training=True, warps=4):
    # Not in the order of the function's parameters, with an option that is none of them.
    kernel[(7,)](*arguments, TRAINING=training, WIDTH=64, num_warps=warps)


def test_a_second_launch_gets_addresses_numbers_and_compile_time_values_in_order(notes):
    function, kernel = notes
    a, b = torch.zeros(64), torch.zeros(64)
    run(kernel, a, b, 5, 0.5)
    assert (function.compilations, function.launches) == (1, [])
    run(kernel, a, b, 6, 0.25)
    assert function.compilations == 1
    assert function.launches == [(a.data_ptr(), b.data_ptr(), 6, 0.25, 64, True)]


def test_a_missing_tensor_stays_none(notes):
    function, kernel = notes
    a = torch.zeros(64)
    for _ in range(2):
        run(kernel, a, None, 5, 0.5)
    assert function.launches == [(a.data_ptr(), None, 5, 0.5, 64, True)]


@pytest.mark.parametrize(
    "other",
    [
        lambda a: (a.half(), a, 5, 0.5),
        lambda a: (a, None, 5, 0.5),
        lambda a: (a, a[1:], 5, 0.5),
        lambda a: (a[1:], a, 5, 0.5),
        lambda a: (a, a, 2**31, 0.5),
    ],
    ids=["dtype", "no tensor", "second address odd", "first address odd", "number of 64 bits"],
)
def test_what_triton_compiles_for_goes_through_triton(notes, other):
    function, kernel = notes
    a = torch.zeros(64)
    run(kernel, a, a, 5, 0.5)
    run(kernel, *other(a))
    assert (function.compilations, function.launches) == (2, [])
    run(kernel, a, a, 5, 0.5)
    assert (function.compilations, len(function.launches)) == (2, 1)


@pytest.mark.parametrize("other", [{"training": False}, {"warps": 8}])
def test_other_compile_time_values_and_options_go_through_triton(notes, other):
    function, kernel = notes
    a = torch.zeros(64)
    run(kernel, a, a, 5, 0.5)
    run(kernel, a, a, 5, 0.5, **other)
    assert (function.compilations, function.launches) == (2, [])


def test_what_triton_did_not_compile_is_not_kept(notes):
    function, kernel = notes
    function.finished = False
    a = torch.zeros(64)
    for _ in range(2):
        run(kernel, a, a, 5, 0.5)
    assert function.compilations == 2


def test_triton_specialises_on_no_integer():
    """Else a kernel compiled for one value would be launched with another."""
    from hf_sparse_attention.ops.triton import operator
    from hf_sparse_attention.ops.triton.launch import Launched

    kernels = [value for value in vars(operator).values() if isinstance(value, Launched)]
    assert len(kernels) == 13
    floats = {"scale", "scaling", "alpha_minus_1", "beta", "unit", "tolerance"}
    for kernel in kernels:
        numbers = [p for p in kernel.function.params if p.name[0].islower() and not p.is_constexpr]
        assert [p.name for p in numbers if p.name not in floats and not p.do_not_specialize] == [], kernel.__name__


def test_tensors_of_another_device_are_launched_there(notes, monkeypatch):
    function, kernel = notes
    a = torch.zeros(64)
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)

        def __exit__(self, *error):
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", Device)
    for _ in range(2):
        run(kernel, a, a, 5, 0.5)
    assert entered == [-1, -1]
    assert (function.compilations, len(function.launches)) == (1, 1)
