"""The chunked path as an operator: opcheck, compilers, export, checkpointing."""

import pytest
import torch
from attention_cases import CASES, Case, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hf_sparse_attention.ops import sparse_attention
from hf_sparse_attention.ops.chunked import ChunkedAttention
from hf_sparse_attention.ops.visibility import resolve_visibility

OPERATOR = torch.ops.hf_sparse_attention.chunked_attention.default
BACKWARD = torch.ops.hf_sparse_attention.chunked_attention_backward.default
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window-scale-slopes": {"is_causal": True, "sliding_window": 4, "query_scale": True, "slopes": True},
    "mask": {"attention_mask": True, "query_scale": True},
}


def inputs(length=9, key_length=11, requires_grad=True):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 6, length, 4), (2, 2, key_length, 4), (2, 2, key_length, 3)]
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


def options(name, length=9, key_length=11):
    generator = torch.Generator().manual_seed(0)
    made = {
        "query_scale": 1 + torch.rand(2, 6, length, generator=generator),
        "slopes": torch.rand(6, generator=generator),
        "attention_mask": torch.rand(2, 1, length, key_length, generator=generator) < 0.6,
    }
    return {key: made.get(key, value) for key, value in OPTIONS[name].items()}


@pytest.mark.parametrize(
    ("alpha", "top_k", "dropout_p"), [(1.5, None, 0.0), (1.25, None, 0.0), (1.0, 3, 0.0), (2.0, None, 0.3)]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck(name, alpha, top_k, dropout_p):
    query, key, value = inputs()
    given = options(name)
    scale, slopes = (given.pop(key).requires_grad_() if key in given else None for key in ("query_scale", "slopes"))
    visibility = resolve_visibility(query, key, **given)
    seed = torch.tensor([7]) if dropout_p else None
    arguments = (query, key, value, alpha, 0.5, scale, slopes, *visibility, None, None, top_k, dropout_p, seed)
    results = torch.library.opcheck(OPERATOR, arguments)
    assert set(results.values()) == {"SUCCESS"}

    arguments = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in arguments]
    output, statistics = OPERATOR(*arguments)
    needs = scale is not None, slopes is not None
    checks = ("test_schema", "test_faketensor")
    results = torch.library.opcheck(
        BACKWARD, (torch.ones_like(output), statistics, *needs, *arguments), test_utils=checks
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiles_without_a_graph_break(name, dynamic):
    torch._dynamo.reset()

    def attend(query, key, value, given):
        return sparse_attention(query, key, value, **given)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (9, 13, 14):
        tensors, given = inputs(length, length + 2), options(name, length, length + 2)
        expected, actual = attend(*tensors, given), compiled(*tensors, given)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(output.square().sum(), tensors) for output in (actual, expected)]
        torch.testing.assert_close(*gradients)


def test_compiles_packed_documents_dropout_and_a_changing_alpha():
    torch._dynamo.reset()
    query = inputs(12, 12)[1][:1].detach()

    def attend(boundaries, alpha, dropout_p):
        return sparse_attention(query, query, query, cu_seqlens=boundaries, alpha=alpha, dropout_p=dropout_p)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    boundaries = torch.tensor([0, 5, 12])
    for alpha in (1.0, 1.1, 1.2, 1.5):
        torch.testing.assert_close(compiled(boundaries, alpha, 0.0), attend(boundaries, alpha, 0.0))
    first, second = compiled(boundaries, 1.5, 0.5), compiled(boundaries, 1.5, 0.5)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_packed_documents_of_fake_tensors(impl):
    with FakeTensorMode() as mode:
        query = torch.empty(1, 2, 7, 4, requires_grad=True)
        boundaries = mode.from_tensor(torch.tensor([0, 3, 7]))
        output = sparse_attention(query, query, query, cu_seqlens=boundaries, impl=impl)
        (gradient,) = torch.autograd.grad(output.sum(), query)
    assert output.shape == gradient.shape == (1, 2, 7, 4)


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return sparse_attention(query, key, value, is_causal=True, sliding_window=5)


def test_exports_with_dynamic_lengths():
    tensors = inputs(requires_grad=False)
    lengths = {2: Dim("keys", min=2)}
    program = torch.export.export(
        Attention(), tuple(tensors), dynamic_shapes=({2: Dim("queries", min=2)}, lengths, lengths)
    )
    assert OPERATOR in [node.target for node in program.graph.nodes]
    others = inputs(20, 31, requires_grad=False)
    torch.testing.assert_close(program.module()(*others), Attention()(*others))


@pytest.fixture
def forward_calls(monkeypatch):
    calls = []
    forward = ChunkedAttention.forward
    monkeypatch.setattr(ChunkedAttention, "forward", lambda self: calls.append(1) or forward(self))
    return calls


def test_selective_checkpointing_can_keep_the_output(forward_calls):
    tensors = inputs()
    expected = torch.autograd.grad(sparse_attention(*tensors).square().sum(), tensors)

    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator == OPERATOR else CheckpointPolicy.PREFER_RECOMPUTE

    forward_calls.clear()
    output = checkpoint(
        lambda *x: sparse_attention(*x).square(),
        *tensors,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    torch.testing.assert_close(torch.autograd.grad(output.sum(), tensors), expected)
    assert len(forward_calls) == 1


def test_checkpointing_recomputes_with_the_same_dropout(forward_calls):
    tensors = inputs()

    def attend(*x):
        return sparse_attention(*x, dropout_p=0.5).square()

    torch.manual_seed(3)
    expected = torch.autograd.grad(attend(*tensors).sum(), tensors)
    forward_calls.clear()
    torch.manual_seed(3)
    output = checkpoint(attend, *tensors, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), tensors), expected)
    assert len(forward_calls) == 2


def test_gradients_only_of_what_needs_them():
    scale = torch.ones(2, 6, 9, requires_grad=True)
    query, key, value = inputs(requires_grad=False)
    (gradient,) = torch.autograd.grad(sparse_attention(query, key, value, query_scale=scale).sum(), scale)
    everything = run(Case(), "chunked", alpha=1.5)
    assert (gradient != 0).any()
    assert set(everything) == {"output", "query", "key", "value"}
    assert set(run(CASES["causal"], "chunked", alpha=1.5)) == {*everything, "query_scale", "slopes"}


def test_the_output_may_be_changed_in_place():
    tensors = inputs()
    expected = torch.autograd.grad((sparse_attention(*tensors) * 2).square().sum(), tensors)
    found = torch.autograd.grad(sparse_attention(*tensors).mul_(2).square().sum(), tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_derivatives_that_are_missing_are_refused_with_what_to_do(alpha):
    query, key, value = inputs()
    (first,) = torch.autograd.grad(
        sparse_attention(query, key, value, alpha=alpha).square().sum(), query, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="second derivatives with impl='reference'"):
        first.sum().backward()
    detached = [tensor.detach() for tensor in (query, key, value)]
    for changed in range(3):

        def attend(tensor, changed=changed):
            return sparse_attention(*detached[:changed], tensor, *detached[changed + 1 :], alpha=alpha)

        with pytest.raises(NotImplementedError, match="impl='chunked' has no forward-mode derivative"):
            torch.func.jvp(attend, (detached[changed],), (torch.ones_like(detached[changed]),))
