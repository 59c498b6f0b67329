"""Arguments of the public function: every error names the argument, and nothing is computed by another backend."""

import inspect
import warnings

import pytest
import torch
from attention_cases import relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_sparse_attention.ops import dispatch, sparse_attention

QUERY, KEY, VALUE = torch.zeros(2, 6, 5, 4), torch.zeros(2, 2, 7, 4), torch.zeros(2, 2, 7, 3)
NESTED = torch.nested.nested_tensor([torch.zeros(5, 4), torch.zeros(3, 4)], layout=torch.jagged)

WRONG_VALUES = {
    "query: three dimensions": ({"query": QUERY[0]}, "query"),
    "query: integers": ({"query": QUERY.long()}, "query"),
    "query: nested": ({"query": NESTED}, "query"),
    "value: sparse": ({"value": VALUE.to_sparse()}, "value"),
    "query: float8": ({"query": QUERY.to(torch.float8_e4m3fn)}, "query"),
    "query: head_dim 0": ({"query": QUERY[..., :0], "key": KEY[..., :0]}, "query"),
    "key: batch": ({"key": KEY[:1]}, "key"),
    "key: head_dim": ({"key": KEY[..., :3]}, "key"),
    "key: heads do not divide": ({"key": torch.zeros(2, 4, 7, 4)}, "key"),
    "key: no heads": ({"key": KEY[:, :0], "value": VALUE[:, :0]}, "key"),
    "key: dtype": ({"key": KEY.double()}, "key"),
    "key: device": ({"key": KEY.to("meta")}, "key"),
    "value: heads": ({"value": VALUE[:, :1]}, "value"),
    "value: length": ({"value": VALUE[:, :, :6]}, "value"),
    "value: head_dim 0": ({"value": VALUE[..., :0]}, "value"),
    "value: dtype": ({"value": VALUE.bfloat16()}, "value"),
    "alpha: below 1": ({"alpha": 0.99}, "alpha"),
    "alpha: above 2": ({"alpha": 2.01}, "alpha"),
    "alpha: nan": ({"alpha": float("nan")}, "alpha"),
    "alpha: with top_k": ({"alpha": 1.5, "top_k": 3}, "alpha"),
    "scaling: infinite": ({"scaling": float("inf")}, "scaling"),
    "query_scale: shape": ({"query_scale": torch.ones(2, 6, 1)}, "query_scale"),
    "query_scale: integers": ({"query_scale": torch.ones(2, 6, 5, dtype=torch.int64)}, "query_scale"),
    "query_scale: device": ({"query_scale": torch.ones(2, 6, 5, device="meta")}, "query_scale"),
    "slopes: key heads": ({"slopes": torch.ones(2)}, "slopes"),
    "slopes: float8": ({"slopes": torch.ones(6).to(torch.float8_e4m3fn)}, "slopes"),
    "slopes: integers": ({"slopes": torch.ones(6, dtype=torch.int32)}, "slopes"),
    "sliding_window: zero": ({"sliding_window": 0}, "sliding_window"),
    "attention_mask: float": ({"attention_mask": torch.zeros(5, 7)}, "attention_mask"),
    "attention_mask: shape": ({"attention_mask": torch.ones(5, 6, dtype=torch.bool)}, "attention_mask"),
    "attention_mask: five": ({"attention_mask": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)}, "attention_mask"),
    "cu_seqlens: batch": ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
    "key_start: shape": ({"key_start": torch.zeros(2, 7, dtype=torch.int32)}, "key_start"),
    "key_start: batch": ({"key_start": torch.zeros(3, 5, dtype=torch.int32)}, "key_start"),
    "key_end: float": ({"key_end": torch.zeros(2, 5)}, "key_end"),
    "query_positions: length": (
        {"slopes": torch.ones(6), "query_positions": torch.zeros(1, 7, dtype=torch.int64)},
        "query_positions",
    ),
    "query_positions: no slopes": ({"query_positions": torch.zeros(1, 5, dtype=torch.int64)}, "query_positions"),
    "key_positions: length": (
        {"slopes": torch.ones(6), "key_positions": torch.zeros(1, 5, dtype=torch.int64)},
        "key_positions",
    ),
    "key_positions: no slopes": ({"key_positions": torch.zeros(1, 7, dtype=torch.int64)}, "key_positions"),
    "top_k: zero": ({"alpha": 1, "top_k": 0}, "top_k"),
    "dropout_p: one": ({"dropout_p": 1.0}, "dropout_p"),
    "dropout_p: negative": ({"dropout_p": -0.1}, "dropout_p"),
    "impl: unknown": ({"impl": "cuda"}, "impl"),
    "impl: chunked has no weights": ({"impl": "chunked", "return_weights": True}, "return_weights"),
    "impl: triton has no top_k": ({"impl": "triton", "alpha": 1, "top_k": 3}, "impl"),
}

WRONG_TYPES = {
    "query": ({"query": [[1.0]]}, "query"),
    "value": ({"value": None}, "value"),
    "alpha": ({"alpha": "1.5"}, "alpha"),
    "alpha: bool": ({"alpha": True}, "alpha"),
    "alpha: tensor": ({"alpha": torch.tensor(1.5)}, "alpha"),
    "scaling": ({"scaling": "0.1"}, "scaling"),
    "query_scale": ({"query_scale": 2.0}, "query_scale"),
    "slopes": ({"slopes": [1.0] * 6}, "slopes"),
    "is_causal": ({"is_causal": 1}, "is_causal"),
    "sliding_window": ({"sliding_window": 3.0}, "sliding_window"),
    "attention_mask": ({"attention_mask": [True]}, "attention_mask"),
    "cu_seqlens": ({"cu_seqlens": [0, 5]}, "cu_seqlens"),
    "key_start": ({"key_start": 0}, "key_start"),
    "key_end": ({"key_end": 7}, "key_end"),
    "top_k": ({"alpha": 1, "top_k": 2.0}, "top_k"),
    "dropout_p": ({"dropout_p": None}, "dropout_p"),
    "return_weights": ({"return_weights": 1}, "return_weights"),
}


def call(**changes):
    return sparse_attention(**{"query": QUERY, "key": KEY, "value": VALUE, **changes})


@pytest.mark.parametrize(("changes", "name"), WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_values_name_the_argument_and_what_is_allowed(changes, name):
    with pytest.raises(ValueError, match=rf"^{name} ") as error:
        call(**changes)
    assert any(word in str(error.value) for word in ("allowed:", "used for"))


@pytest.mark.parametrize(("changes", "name"), WRONG_TYPES.values(), ids=WRONG_TYPES.keys())
def test_wrong_types_name_the_argument(changes, name):
    with pytest.raises(TypeError, match=rf"^{name} must be .* got"):
        call(**changes)


@pytest.mark.parametrize(
    "boundaries", [[0, 4], [1, 5], [0, 3, 2, 5], [0, 3, 6], [5]], ids=["short", "late", "descending", "long", "one"]
)
def test_wrong_document_boundaries(boundaries):
    query = QUERY[:1, :2]
    with pytest.raises(ValueError, match=r"^cu_seqlens ") as error:
        sparse_attention(query, query, query, cu_seqlens=torch.tensor(boundaries))
    assert "allowed:" in str(error.value)


def test_document_boundaries_must_be_integers_and_self_attention():
    with pytest.raises(ValueError, match=r"^cu_seqlens has dtype torch\.float32"):
        sparse_attention(QUERY[:1], QUERY[:1], QUERY[:1], cu_seqlens=torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match="equal query and key lengths"):
        sparse_attention(QUERY[:1], KEY[:1], VALUE[:1], cu_seqlens=torch.tensor([0, 5]))


def test_the_validated_arguments_are_all_there_are():
    tested = {name for _, name in [*WRONG_VALUES.values(), *WRONG_TYPES.values()]}
    assert tested == set(inspect.signature(sparse_attention).parameters)


def test_defaults():
    query, key, value = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(3))
    explicit = sparse_attention(query, key, value, alpha=1.5, scaling=8**-0.5, dropout_p=0.0, impl="chunked")
    assert torch.equal(sparse_attention(query, key, value), explicit)


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_softmax_equals_pytorch(impl):
    query, key, value = (torch.randn(2, 4, 33, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    actual = sparse_attention(query, key, value, alpha=1.0, is_causal=True, impl=impl)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_autocast_computes_in_its_dtype_as_pytorch_does(impl, alpha):
    query, key = torch.randn(2, 1, 3, 20, 8).unbind(0)
    value = torch.randn(1, 3, 20, 8, dtype=torch.bfloat16)
    options = {"is_causal": True, "alpha": alpha, "impl": impl}
    with torch.autocast("cpu", torch.bfloat16):
        actual = sparse_attention(query.requires_grad_(), key, value, **options)
    assert actual.dtype == torch.bfloat16
    expected = sparse_attention(query.bfloat16(), key.bfloat16(), value, **options)
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual.float().sum(), query)
    assert gradient.dtype == torch.float32
    assert (gradient != 0).any()


def test_autocast_leaves_float64_alone():
    query = torch.randn(1, 3, 20, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_attention(query, query, query).dtype == torch.float64


def test_layouts_of_inputs_do_not_matter():
    query, key, value = (torch.randn(2, 9, 4, 8, dtype=torch.float64) for _ in range(3))
    strided = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    actual = sparse_attention(*strided, is_causal=True)
    expected = sparse_attention(*(tensor.contiguous() for tensor in strided), is_causal=True)
    assert relative_error(actual, expected) < 1e-14


def test_triton_is_refused_on_a_cpu_tensor_with_the_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"impl is 'triton', but .*triton is not installed; allowed: impl='auto'"):
        call(impl="triton")


def test_a_slower_path_on_cuda_warns_once_and_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    dispatch._warn_once.cache_clear()
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        query = torch.empty(1, 2, 5, 4, device="cuda")
        for _ in range(2):
            output = sparse_attention(query, query, query, dropout_p=0.1)
        assert output.device.type == "cuda"
    messages = [str(warning.message) for warning in caught if "Triton" in str(warning.message)]
    assert len(messages) == 1
    assert "'chunked'" in messages[0]
    assert "do not support dropout_p" in messages[0]
