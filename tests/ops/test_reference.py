"""The reference against the definition of entmax, and the ranges against a direct reading of each option."""

import sys

import pytest
import torch
from attention_cases import ALPHAS

from hf_sparse_attention.ops import resolve_visibility, sparse_attention
from hf_sparse_attention.ops.reference import entmax_weights


def rows(length, kind):
    generator = torch.Generator().manual_seed(length)
    scores = torch.randn(20, length, generator=generator, dtype=torch.float64)
    return {"normal": scores, "wide": 1e4 * scores, "narrow": 1e-3 * scores, "equal": 0 * scores + 7.0}[kind]


@pytest.mark.parametrize("kind", ["normal", "wide", "narrow", "equal"])
@pytest.mark.parametrize("length", [1, 2, 63, 1000])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_satisfy_the_conditions_of_optimality(alpha, length, kind):
    scores = rows(length, kind)
    weights = entmax_weights(scores, alpha)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.float64), atol=1e-10, rtol=0)
    if alpha > 1:
        # p ** (alpha - 1) = (alpha - 1) z - tau on the support, and (alpha - 1) z <= tau outside of it.
        tau = (alpha - 1) * scores - weights ** (alpha - 1)
        support = weights > 1e-12
        lowest = torch.where(support, tau, torch.inf).amin(-1)
        highest = torch.where(support, tau, -torch.inf).amax(-1)
        torch.testing.assert_close(lowest, highest, atol=1e-8, rtol=1e-8)
        outside = torch.where(weights == 0, (alpha - 1) * scores, -torch.inf).amax(-1)
        assert (outside <= highest + 1e-8).all()
    else:
        torch.testing.assert_close(weights, scores.softmax(-1), atol=1e-15, rtol=1e-12)


def test_sparsemax_and_entmax15_of_known_rows():
    scores = torch.tensor([[1.0, 0.5, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(entmax_weights(scores, 2.0), torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64))
    # Of two scores d apart, 1.5-entmax gives p with sqrt(p) - sqrt(1 - p) = d / 2.
    weights = entmax_weights(torch.tensor([[0.8, 0.0]], dtype=torch.float64), 1.5)
    assert (weights[0, 0].sqrt() - weights[0, 1].sqrt()).item() == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_hidden_scores_are_as_if_absent(alpha):
    scores = rows(63, "normal").requires_grad_()
    visible = torch.rand(20, 63, generator=torch.Generator().manual_seed(0)) < 0.4
    visible[3] = False
    weights = entmax_weights(scores, alpha, visible)
    for row in range(20):
        alone = entmax_weights(scores[row, visible[row]], alpha)
        torch.testing.assert_close(weights[row, visible[row]], alone, atol=1e-12, rtol=0)
    assert (weights[~visible] == 0).all()
    (gradient,) = torch.autograd.grad((weights * torch.randn(63, dtype=torch.float64)).sum(), scores)
    assert (gradient[~visible] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reference_gradcheck(alpha):
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, 4, 4, 3), (1, 2, 6, 3), (1, 2, 6, 2), (1, 4, 4), (4,)]
    inputs = [torch.rand(shape, generator=generator, dtype=torch.float64).mul(2).requires_grad_() for shape in shapes]
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False

    def attend(query, key, value, scale, slopes):
        return sparse_attention(
            query, key, value, alpha=alpha, query_scale=scale, slopes=slopes, attention_mask=mask, impl="reference"
        )

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reference_has_second_derivatives(alpha):
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.rand(shape, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
        for shape in [(1, 2, 3, 3), (1, 1, 5, 3), (1, 1, 5, 2)]
    )

    def attend(*tensors):
        return sparse_attention(*tensors, alpha=alpha, is_causal=True, impl="reference")

    assert torch.autograd.gradgradcheck(attend, (query, key, value))

    def loss(*tensors):
        return attend(*tensors).square().sum()

    (expected,) = torch.autograd.grad(loss(query, key, value), query)
    stacked = [torch.stack([tensor.detach()] * 2, 1) for tensor in (query, key, value)]
    found = torch.func.vmap(torch.func.grad(loss), in_dims=1)(*stacked)
    torch.testing.assert_close(found, torch.stack([expected] * 2))


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
def test_returned_weights_are_differentiable_in_compiled_code(alpha):
    torch._dynamo.reset()
    query, key, value = (torch.randn(1, 2, 9, 4).requires_grad_() for _ in range(3))

    def attend(query):
        output, weights = sparse_attention(query, key, value, alpha=alpha, is_causal=True, return_weights=True)
        return output.square().sum() + weights.square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    (expected,), (actual,) = (torch.autograd.grad(function(query), query) for function in (attend, compiled))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_dtype_and_returns_the_weights(dtype):
    query, key, value = torch.randn(3, 2, 3, 9, 4).to(dtype)
    output, weights = sparse_attention(query, key, value, is_causal=True, return_weights=True)
    assert output.dtype == weights.dtype == dtype
    assert weights.shape == (2, 3, 9, 9)
    assert (weights.triu(1) == 0).all()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(weights @ value, output, atol=tolerance, rtol=tolerance)


OPTIONS = {
    "nothing": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "sliding_window": 3},
    "window-of-one": {"is_causal": True, "sliding_window": 1},
    "window-bidirectional": {"sliding_window": 3},
    "window-of-any-size": {"sliding_window": sys.maxsize},
    "window-of-any-size-causal": {"is_causal": True, "sliding_window": 10**30},
    "ranges": {
        "key_start": torch.tensor([[3] * 7, [0, 1, 2, 3, 9, -2, 50]]),
        "key_end": torch.tensor([[5, 5, 5, 5, 99, 2, 3]]),
    },
    "all": {
        "is_causal": True,
        "sliding_window": 5,
        "key_start": torch.tensor([[2] * 7]),
        "key_end": torch.tensor([[6] * 7, [9] * 7]),
    },
}


@pytest.mark.parametrize("key_length", [7, 11, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_ranges_say_what_each_option_says(name, key_length):
    options = OPTIONS[name]
    query, key = torch.zeros(2, 1, 7, 1), torch.zeros(2, 1, key_length, 1)
    visibility = resolve_visibility(query, key, **options)
    actual = visibility.dense(query, key)
    start, end = visibility.ranges(query, key)
    assert start.dtype == end.dtype == torch.int32
    for b in range(2):
        for i in range(7):
            for j in range(key_length):
                position, expected = i + key_length - 7, True
                if options.get("is_causal"):
                    expected &= j <= position
                if "sliding_window" in options:
                    gap = position - j if options.get("is_causal") else abs(position - j)
                    expected &= gap < options["sliding_window"]
                for bound, holds in (("key_start", int.__ge__), ("key_end", int.__lt__)):
                    if bound in options:
                        expected &= holds(j, int(options[bound][b % len(options[bound]), i]))
                seen = True if actual is None else bool(actual[b % actual.shape[0], 0, i, j])
                assert seen == expected, (b, i, j)


def test_packed_documents_do_not_see_each_other():
    query = torch.zeros(1, 1, 8, 1)
    visibility = resolve_visibility(query, query, cu_seqlens=torch.tensor([0, 3, 3, 8]))
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    assert torch.equal(visibility.dense(query, query)[0, 0], document[:, None] == document)
