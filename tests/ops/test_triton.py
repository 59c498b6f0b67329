"""The Triton kernels under Triton's interpreter, on the CPU, against dense attention in float64.

The interpreter is chosen when Triton is imported, so the cases run in a process of their own.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forked, forking

CASES = {
    "one query, one key": "Case(1, 1)",
    "odd length, groups of three heads": "Case(37, 37, 3, 1, scores='sharp')",
    "heavy tails, queries that see nothing": "Case(33, 50, scores='heavy', ranges='holes')",
    "huge scores": "Case(35, 35, 1, scores='huge')",
    "equal scores, left padding": "Case(40, 40, 1, batch=2, dtype=torch.float16, scores='equal', ranges='padded')",
    "sparsemax, packed documents": "Case(40, 40, 2, alpha=2.0, ranges='packed', scale=True, slopes=True)",
    "any alpha, window, head dimension 20 and values of 12": "Case(35, 35, 1, 1, 20, 12, alpha=1.3, ranges='window')",
    "given positions, more keys than queries": "Case(20, 50, 2, scores='needle', slopes=True, positions=True)",
    "many key tiles": "Case(36, 530, 1, scores='sharp')",
    "many key tiles, fp16, any alpha": "Case(33, 530, 1, dtype=torch.float16, alpha=1.7, ranges='full')",
    "softmax, scale and slopes": "Case(35, 50, 2, alpha=1.0, ranges='holes', scale=True, slopes=True)",
}
DECODE_CASES = {
    "one query": "Case(1, 70, 4, 2)",
    "sparsemax, padding, scale and slopes": "Case(3, 77, 3, 1, 24, 40, batch=2, alpha=2.0, ranges='padded', "
    "scale=True, slopes=True)",
    "softmax": "Case(2, 50, alpha=1.0, scale=True, slopes=True)",
    "queries that see nothing": "Case(5, 50, alpha=1.3, scores='sharp', ranges='holes')",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux", reason="needs the package triton"
)


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory) -> Iterator[Forked]:
    """Runs a program where Triton interprets its kernels, in a fork: every import takes seconds."""
    root = Path(__file__).parents[2]
    changes = {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)]),
        "PYTHONWARNINGS": "ignore::RuntimeWarning",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    imports = "import torch\nfrom triton_cases import *"
    with forking(imports, tmp_path_factory.mktemp("interpreter"), {**os.environ, **changes}) as run:
        yield run


@pytest.fixture
def interpret(interpreter) -> Callable[[str], None]:
    def run(code: str) -> None:
        done = interpreter(code)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


# So many keys as one kernel holds by itself go to it; then none do.
GENERAL = """
from hf_sparse_attention.ops.triton import operator
tiling = operator.tiling
def without_short(*arguments):
    tiles = tiling(*arguments)
    return tiles._replace(short=tiles.short._replace(columns=0))
operator.tiling = without_short
"""


@pytest.fixture
def interpret_both(interpret) -> Callable[[str], None]:
    """Code with one kernel for few keys, and again without."""
    return lambda code: interpret(code + GENERAL + code)


def test_forward_and_gradients_match_dense(interpret):
    interpret(GENERAL + "\n".join(f"check_against_dense({case})" for case in CASES.values()))


def test_few_keys_match_dense(interpret):
    interpret("\n".join(f"check_against_dense({case})" for case in CASES.values() if "530" not in case))


# Every address that a kernel reads or writes must be one of an element of the tensors that it was given.
WATCHED = """
import re
from pathlib import Path
import numpy
from triton.runtime import interpreter
from hf_sparse_attention.ops.triton import launch

accesses = interpreter._interpreter

def check(pointers, mask, size):
    first = numpy.asarray(pointers)[numpy.asarray(mask, bool)].astype(numpy.int64)
    inside = numpy.zeros(first.shape, bool)
    for low, high in launch.ranges:
        inside |= (first >= low) & (first + size <= high)
    if not inside.all():
        raise IndexError(f"{(~inside).sum()} of {first.size} addresses are outside of every tensor")

class Watched:
    def __getattr__(self, name):
        return getattr(accesses, name)

    def load(self, pointers, mask, other, dtype):
        check(pointers, mask, numpy.dtype(dtype).itemsize)
        return accesses.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        check(pointers, mask, value.dtype.itemsize)
        return accesses.store(pointers, value, mask)

def reach(tensor):
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * (tensor.numel() > 0)

launched = launch.Launched.launch

def watch(self, grid, *arguments, **constants):
    launch.ranges = [reach(tensor.detach()) for tensor in arguments if torch.is_tensor(tensor)]
    launched(self, grid, *arguments, **constants)
    launch.seen.add(self.function.fn.__name__)

launch.seen, launch.Launched.launch, interpreter._interpreter = set(), watch, Watched()
"""


def test_no_access_outside_of_the_tensors(interpret):
    cases = ("odd length, groups of three heads", "sparsemax, packed documents", "softmax, scale and slopes")
    long = ("Case(36, 100, 2, slopes=True, positions=True)", "Case(3, 77, 3, 1, 24, 40, batch=2, ranges='padded')")
    code = "\n".join(f"run_kernels({case}, make_inputs({case}))" for case in [*map(CASES.get, cases), *long])
    code += f"""
with torch.no_grad():
    run_forward({long[1]}, make_inputs({long[1]}))
source = "".join(file.read_text() for file in Path(launch.__file__).parent.glob("*.py"))
kernels = set(re.findall(r"def (\\w+_kernel)\\(", source))
assert launch.seen == kernels, kernels - launch.seen
query = torch.zeros(2, 1, 1, 16)
launch.ranges = [reach(query)]
for first in (query.data_ptr() - 4, reach(query)[1]):
    try:
        check([first, query.data_ptr()], [True, True], 4)
        raise SystemExit("an address outside went unseen")
    except IndexError:
        check([first, query.data_ptr()], [False, True], 4)
"""
    interpret(WATCHED + code)


def test_gradient_of_slopes_does_not_suffer_from_the_rounded_mean(interpret):
    """Errors of delta, all of one sign in a row, are multiplied by distances."""
    interpret(
        """
case = Case(40, 40, 4, 2, 24, 16, alpha=1.0, dtype=torch.float16, slopes=True)
for seed in range(2):
    inputs = make_inputs(case, seed=seed)
    error, eager = (
        (run(case, inputs, *dtype)[4] - run_dense(case, inputs, torch.float64)[4]).norm()
        for run, dtype in ((run_kernels, ()), (run_dense, (torch.float16,)))
    )
    assert error < 0.1 * eager, (error, eager)
"""
    )


def test_negative_scaling_is_that_of_negated_queries(interpret_both):
    interpret_both(
        """
from hf_sparse_attention.ops import sparse_attention
i = make_inputs(Case(20, 40, 1, 1, scores='sharp'))
found = sparse_attention(i.query, i.key, i.value, scaling=-0.25, is_causal=True, impl="triton")
negated = sparse_attention(-i.query, i.key, i.value, scaling=0.25, is_causal=True, impl="triton")
assert torch.equal(found, negated)
gradients = [torch.autograd.grad(out, (i.query, i.key, i.value), i.grad) for out in (found, negated)]
assert all(torch.equal(a, b) for a, b in zip(*gradients))
"""
    )


def test_decode_matches_dense(interpret):
    interpret("\n".join(f"check_decode_against_dense({case})" for case in DECODE_CASES.values()))


def test_operators_fulfil_their_contract(interpret):
    """Schemas, fake kernels and gradients as torch.library checks them."""
    interpret(
        """
from hf_sparse_attention.ops.triton.operator import decode_op, forward_op
case = Case(20, 20, 2, 1, scale=True, slopes=True)
i = make_inputs(case)
arguments = (i.query, i.key, i.value, i.query_scale, i.slopes, i.key_start, i.key_end, None, 1.5, 0.25)
torch.library.opcheck(forward_op, (*arguments, True), test_utils=("test_schema", "test_faketensor"))
torch.library.opcheck(decode_op, tuple(a.detach() if torch.is_tensor(a) else a for a in arguments),
                      test_utils=("test_schema", "test_faketensor"))
"""
    )


def test_reruns_are_bit_identical_and_empty_inputs_work(interpret_both):
    interpret_both(
        """
case = Case(35, 35, 2, 1, scores='sharp', scale=True)
inputs = make_inputs(case)
for first, second in zip(run_kernels(case, inputs), run_kernels(case, inputs)):
    assert torch.equal(first, second)
for empty in (Case(0, 5), Case(5, 0), Case(5, 5, batch=0)):
    inputs = make_inputs(empty)
    inputs.key_start = torch.zeros(1, empty.q_len, dtype=torch.int32)
    inputs.key_end = torch.full((1, empty.q_len), empty.k_len, dtype=torch.int32)
    assert all(not tensor.any() for tensor in run_kernels(empty, inputs))
"""
    )


def test_offsets_of_64_bits_give_the_same_gradients(interpret):
    interpret(
        """
from hf_sparse_attention.ops.triton import geometry
for case in (Case(37, 37, 3, 1, scores='sharp', batch=2), Case(20, 50, 2, 1, 20, 12, slopes=True, ranges='holes')):
    inputs = make_inputs(case)
    near = run_kernels(case, inputs)
    limit, geometry._NEAR = geometry._NEAR, 0
    for first, second in zip(near, run_kernels(case, inputs)):
        assert torch.equal(first, second)
    geometry._NEAR = limit
"""
    )


def test_heads_of_many_elements_are_addressed_by_64_bits(interpret):
    """Meta tensors: what decides is the span of a head, not what it holds."""
    interpret(
        """
from hf_sparse_attention.ops.triton.geometry import near
heads = lambda rows, stride: torch.empty_strided((2, 3, rows, 64), (2**40, 64, stride, 1), device="meta")
assert near((heads(2**20, 2**10), heads(1, 2**33)), 2**31 - 1)
assert not near((heads(64, 64), heads(2**20 + 1, 2**11)), 1)
assert not near((heads(64, 64),), 2**31)
"""
    )


def test_ranges_beyond_the_keys_are_clamped(interpret_both):
    interpret_both(
        """
from hf_sparse_attention.ops import sparse_attention
limits = torch.iinfo(torch.int32)
for length, training in ((40, True), (5, False)):
    i = make_inputs(Case(length, 50, 2, 1, scores='sharp'))
    index = torch.arange(length, dtype=torch.int32)[None]
    start = torch.where(index % 3 == 0, limits.min, index - 3)
    end = torch.where(index % 5 == 0, limits.max, index + 7)
    start, end = torch.where(index % 7 == 1, -9, start), torch.where(index % 7 == 1, -4, end)
    start, end = torch.where(index % 7 == 2, 60, start), torch.where(index % 7 == 2, 70, end)
    found = []
    for given in ((start, end), (start.clamp(0, 50), end.clamp(0, 50)), (start.long(), end.long())):
        with torch.set_grad_enabled(training):
            out = sparse_attention(i.query, i.key, i.value, key_start=given[0], key_end=given[1], impl="triton")
        gradients = torch.autograd.grad(out, (i.query, i.key, i.value), i.grad) if training else ()
        found.append((out, *gradients))
    exact = sparse_attention(i.query, i.key, i.value, key_start=start, key_end=end, impl="reference")
    torch.testing.assert_close(found[0][0], exact, atol=1e-4, rtol=1e-4)
    assert not exact[:, :, 1:3].any() and exact[:, :, 3].any()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
"""
    )


def test_nan_in_a_query_is_not_hidden(interpret_both):
    interpret_both(
        """
case = Case(20, 20, 1)
inputs = make_inputs(case)
with torch.no_grad():
    inputs.query[0, 0, 7] = float("nan")
output = run_forward(case, inputs)
assert output[0, 0, 7].isnan().all() and not output[0, 0, :7].isnan().any()
"""
    )


def test_reasons_name_what_is_not_supported(interpret):
    interpret(
        """
from hf_sparse_attention.ops.triton import unsupported_reason
make = lambda dim, dtype: torch.zeros(1, 1, 2, dim, dtype=dtype)
for tensor, alpha, part in (
    (make(16, torch.float64), 1.5, "float64"),
    (make(300, torch.float32), 1.5, "300"),
    (make(16, torch.float32), 1.0005, "1.0005"),
):
    assert part in unsupported_reason(tensor, tensor, tensor, alpha)
assert unsupported_reason(make(16, torch.float32), make(16, torch.float32), make(16, torch.float32), 1.5) is None
"""
    )
