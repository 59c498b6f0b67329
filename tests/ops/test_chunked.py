"""The chunked path against the float64 reference: outputs, gradients, memory and dropout."""

import pytest
import torch
from attention_cases import ALPHAS, CASES, Case, relative_error, run
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse_attention.ops import sparse_attention, tiles
from hf_sparse_attention.ops.chunked import ChunkedAttention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def names(values):
    return [str(value).removeprefix("torch.") for value in values]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_float64(name, alpha):
    expected = run(CASES[name], "reference", alpha=alpha)
    actual = run(CASES[name], "chunked", alpha=alpha)
    assert {key: relative_error(actual[key], expected[key]) for key in expected} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=1e-10
    )


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_on_a_gpu(name, alpha):
    expected = run(CASES[name], "reference", alpha=alpha)
    actual = run(CASES[name], "chunked", alpha=alpha, device="cuda")
    assert {key: relative_error(actual[key], expected[key]) for key in expected} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=1e-10
    )


@pytest.mark.parametrize("name", ["causal-gqa3-dim100", "left-padded", "packed", "window", "mask-per-head-gqa"])
def test_does_not_depend_on_the_tiles(name, monkeypatch):
    expected = run(CASES[name], "chunked", alpha=1.5)
    monkeypatch.setattr(tiles, "_CPU_TILE_SCORES", 700)
    monkeypatch.setattr(tiles, "_MIN_TILE_QUERIES", 5)
    actual = run(CASES[name], "chunked", alpha=1.5)
    assert {key: relative_error(actual[key], expected[key]) for key in expected} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", ["bidirectional", "causal-gqa3-dim100", "gqa5-key-longer", "gqa7-dim33", "packed"])
def test_low_precision_is_as_good_as_eager(name, alpha, dtype):
    expected = run(CASES[name], "reference", alpha=alpha)
    actual = run(CASES[name], "chunked", dtype, alpha=alpha)
    eager = run(CASES[name], "eager", dtype, alpha=alpha)
    for key in expected:
        bound = 2 * relative_error(eager[key], expected[key]) + 4e-6
        assert relative_error(actual[key], expected[key]) <= bound, key


@pytest.mark.parametrize("name", ["causal", "gqa5-key-longer", "mask-with-empty-rows", "left-padded", "decode"])
@pytest.mark.parametrize("top_k", [1, 7, 200])
def test_top_k_equals_the_reference(name, top_k):
    expected = run(CASES[name], "reference", alpha=1.0, top_k=top_k)
    actual = run(CASES[name], "chunked", alpha=1.0, top_k=top_k)
    assert {key: relative_error(actual[key], expected[key]) for key in expected} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=1e-10
    )


def test_top_k_keeps_ties_with_the_last_kept_score():
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0]).view(1, 1, 5, 1)
    output = sparse_attention(query, key, torch.eye(5)[None, None], alpha=1.0, top_k=2, impl="chunked")
    expected = torch.cat([torch.tensor([3.0, 2.0, 2.0, 2.0]).softmax(0), torch.zeros(1)])
    torch.testing.assert_close(output.flatten(), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck(alpha):
    case = Case(query_heads=4, query_length=5, key_length=7, head_dim=3, value_dim=2, extras=("query_scale", "slopes"))
    inputs = case.tensors(seed=3)
    del inputs["grad"]
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[1, :, 2] = False
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def attend(*tensors):
        return sparse_attention(
            **dict(zip(inputs, tensors)), alpha=alpha, is_causal=True, attention_mask=mask, impl="chunked"
        )

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_queries_without_a_visible_key_give_zeros_and_no_gradient(alpha, impl):
    case = Case(batch=3, extras=("query_scale", "slopes"))
    start, end = torch.zeros(3, 63, dtype=torch.int64), torch.full((3, 63), 63)
    start[0, :5] = 63
    end[1] = 0
    mask = torch.ones(3, 1, 63, 63, dtype=torch.bool)
    mask[2, :, 9] = False
    blind = torch.zeros(3, 63, dtype=torch.bool)
    blind[0, :5], blind[1], blind[2, 9] = True, True, True
    result = run(case, impl, alpha=alpha, key_start=start, key_end=end, attention_mask=mask)
    assert all(tensor.isfinite().all() for tensor in result.values())
    for name in ("output", "query", "query_scale"):
        rows = result[name].transpose(1, 2)
        assert (rows[blind] == 0).all(), name
        assert (rows[~blind] != 0).any(), name
    assert (result["key"][1] == 0).all()
    assert (result["value"][1] == 0).all()


@pytest.mark.parametrize(("query_length", "key_length"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(query_length, key_length):
    result = run(Case(query_length=query_length, key_length=key_length), "chunked", alpha=1.5, is_causal=True)
    assert result["output"].shape == (2, 2, query_length, 16)
    assert all((tensor == 0).all() for tensor in result.values())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_scores_of_ten_thousand(alpha):
    # Small integers make every score exact in float32.
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randint(-8, 9, (1, 2, 50, 16), generator=generator).double() for _ in range(2))
    value = torch.randn(1, 2, 50, 3, generator=generator).double()
    outputs = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "chunked")):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
        output = sparse_attention(*inputs, alpha=alpha, scaling=32.0, is_causal=True, impl=impl)
        gradients = torch.autograd.grad(output.sum(), inputs)
        outputs.append([tensor.double() for tensor in (output, *gradients)])
    assert (query @ key.mT * 32).abs().max() > 1e4
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=names([torch.float64, torch.float32]))
@pytest.mark.parametrize("length", [1, 2, 1000, 100_000])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_scores_give_the_mean_of_the_values(alpha, length, dtype):
    value = torch.randn(1, 1, length, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query, key = torch.full((1, 1, 2, 4), 50.0, dtype=dtype), torch.full((1, 1, length, 4), 50.0, dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value.to(dtype))]
    output = sparse_attention(*inputs, alpha=alpha, impl="chunked")
    gradients = torch.autograd.grad(output.sum(), inputs)
    torch.testing.assert_close(output.double(), value.mean(2, keepdim=True).expand(1, 1, 2, 3), atol=2e-6, rtol=0)
    torch.testing.assert_close(gradients[2].double(), torch.full_like(value, 2 / length), atol=0, rtol=1e-5)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("above", [0.1, 1e-3, 1e-6])
def test_many_ties_at_the_edge_of_the_support(alpha, above):
    # One score at the top, the others just inside its reach: the slowest rows for threshold searches.
    scores = torch.full((5000,), (above - 1.0) / (alpha - 1.0), dtype=torch.float64)
    scores[17] = 0.0
    query, key = torch.ones(1, 1, 1, 1, dtype=torch.float64), scores.view(1, 1, -1, 1)
    value = torch.randn(1, 1, 5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = sparse_attention(query, key, value, alpha=alpha, impl="chunked")
    expected = sparse_attention(query, key, value, alpha=alpha, impl="reference")
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-8, 1e-15])
def test_alpha_goes_to_softmax_continuously(distance):
    softmax = run(CASES["causal"], "chunked", torch.float32, alpha=1.0)
    entmax = run(CASES["causal"], "chunked", torch.float32, alpha=1.0 + distance)
    for name in softmax:
        assert relative_error(entmax[name], softmax[name]) < 10 * distance + 2e-6, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=names([torch.float64, torch.float32]))
@pytest.mark.parametrize("distance", [2.3e-16, 1e-9, 1e-6, 1e-4, 2e-4])
def test_alpha_goes_to_sparsemax_continuously(distance, dtype):
    sparsemax = run(CASES["causal"], "chunked", dtype, alpha=2.0)
    entmax = run(CASES["causal"], "chunked", dtype, alpha=2.0 - distance)
    for name in sparsemax:
        assert relative_error(entmax[name], sparsemax[name]) < 20 * distance + 4e-6, name


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_dropout_drops_weights_and_rescales_the_others(alpha):
    query, key = (torch.randn(1, 2, 90, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    identity = torch.eye(90).expand(1, 2, 90, 90)
    weights = sparse_attention(query, key, identity, alpha=alpha, is_causal=True, impl="chunked")
    torch.manual_seed(5)
    dropped = sparse_attention(query, key, identity, alpha=alpha, is_causal=True, dropout_p=0.3, impl="chunked")
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.7)
    fraction = kept.sum() / (weights != 0).sum()
    assert fraction.item() == pytest.approx(0.7, abs=0.04)

    again = sparse_attention(query, key, identity, alpha=alpha, is_causal=True, dropout_p=0.3, impl="chunked")
    assert not torch.equal(again, dropped)
    torch.manual_seed(5)
    again = sparse_attention(query, key, identity, alpha=alpha, is_causal=True, dropout_p=0.3, impl="chunked")
    assert torch.equal(again, dropped)


def test_dropout_is_the_same_in_the_backward(monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE_SCORES", 40)
    monkeypatch.setattr(tiles, "_MIN_TILE_QUERIES", 2)
    inputs = Case(query_length=6, key_length=6, head_dim=3, value_dim=2).tensors(seed=1)
    leaves = [inputs[name].requires_grad_() for name in ("query", "key", "value")]

    def attend(*tensors):
        torch.manual_seed(0)
        return sparse_attention(*tensors, dropout_p=0.4, is_causal=True, impl="chunked")

    assert torch.autograd.gradcheck(attend, leaves)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5])
def test_never_holds_a_matrix_of_scores(alpha, monkeypatch):
    length, budget = 700, 16 * 700
    monkeypatch.setattr(tiles, "_CPU_TILE_SCORES", budget // torch.get_num_threads())
    query, key, value, grad = (torch.randn(1, 2, length, 4) for _ in range(4))
    attention = ChunkedAttention(query, key, value, alpha, 0.5, None, torch.ones(2))
    with LargestTensor() as record:
        _, statistics = attention.forward()
        attention.backward(grad, statistics, False, True)
    assert 0 < record.largest <= budget < length**2 / 10


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_nan_is_not_hidden(alpha, impl):
    query, key, value = (torch.randn(1, 2, 20, 8) for _ in range(3))
    query[0, 0, 4] = torch.nan
    key[0, 1, 15] = torch.nan
    output = sparse_attention(query, key, value, alpha=alpha, is_causal=True, impl=impl)
    assert torch.equal(output[0, 0].isnan().any(-1).nonzero().flatten(), torch.tensor([4]))
    assert output[0, 1, 15:].isnan().all()
