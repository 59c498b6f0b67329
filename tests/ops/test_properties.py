"""A search for shapes and masks on which the chunked path and the reference differ."""

from unittest import mock

import torch
from attention_cases import DIFFERENTIABLE, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sparse_attention.ops import sparse_attention, tiles

SETTINGS = settings(
    max_examples=120, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ALPHA = st.one_of(st.sampled_from([1.0, 1.01, 1.5, 2.0]), st.floats(1.001, 1.95))


@st.composite
def calls(draw):
    """Arguments of ``sparse_attention`` in float64, and a tile size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))
    batch, key_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    query_length, key_length = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    head_dim, value_dim = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    packed = draw(st.booleans())
    if packed:
        batch, key_length = 1, query_length

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    heads = key_heads * group
    arguments = {
        "query": normal(batch, heads, query_length, head_dim) * draw(st.sampled_from([0.0, 0.1, 1.0, 30.0])),
        "key": normal(batch, key_heads, key_length, head_dim),
        "value": normal(batch, key_heads, key_length, value_dim),
        "is_causal": draw(st.booleans()),
        "alpha": draw(ALPHA),
    }
    if draw(st.booleans()):
        arguments["query_scale"] = normal(batch, heads, query_length).exp()
    if draw(st.booleans()):
        arguments["slopes"] = normal(heads).abs()
    if draw(st.booleans()):
        arguments["sliding_window"] = draw(st.integers(1, 45))
    if packed:
        inner = integers(0, query_length + 1, draw(st.integers(0, 4))).sort().values
        arguments["cu_seqlens"] = torch.cat([torch.tensor([0]), inner, torch.tensor([query_length])])
    if draw(st.booleans()):
        sizes = (batch, heads, query_length, key_length)
        shape = [size if draw(st.booleans()) else 1 for size in sizes]
        arguments["attention_mask"] = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    for name in ("key_start", "key_end"):
        if draw(st.booleans()):
            arguments[name] = integers(-3, key_length + 4, draw(st.sampled_from([1, batch])), query_length)
    if draw(st.booleans()):
        arguments.update(alpha=1.0, top_k=draw(st.integers(1, 45)))
    return arguments, draw(st.sampled_from([1, 100, 1000, 2**18]))


@SETTINGS
@given(calls())
def test_chunked_equals_reference(call):
    arguments, tile_scores = call
    leaves = [arguments[name].requires_grad_() for name in DIFFERENTIABLE if name in arguments]
    results = []
    with mock.patch.object(tiles, "_CPU_TILE_SCORES", tile_scores), mock.patch.object(tiles, "_MIN_TILE_QUERIES", 3):
        for impl in ("reference", "chunked"):
            output = sparse_attention(**arguments, impl=impl)
            weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
            results.append([output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)])
    for expected, actual in zip(*results):
        assert actual.isfinite().all()
        assert relative_error(actual, expected) < 1e-7


@SETTINGS
@given(st.integers(0, 2**32), st.integers(1, 60), ALPHA, st.floats(1e-3, 1e3))
def test_output_is_a_mean_of_visible_values_and_ignores_shifts(seed, length, alpha, size):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 1, length, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    output = sparse_attention(query * size, key, value, alpha=alpha, is_causal=True)
    limits = [value.cummax(2).values + 1e-9, value.cummin(2).values - 1e-9]
    assert (output <= limits[0]).all()
    assert (output >= limits[1]).all()
    # A constant added to all keys adds one constant to the scores of each query.
    shifted = sparse_attention(query * size, key + 1.0, value, alpha=alpha, is_causal=True)
    assert relative_error(shifted, output) < 1e-6
