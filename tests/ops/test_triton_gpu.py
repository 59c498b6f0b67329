"""The Triton kernels on a GPU, against dense attention in float64."""

import pytest
import torch
from triton_cases import (
    Case,
    Inputs,
    check_against_dense,
    check_decode_against_dense,
    make_inputs,
    run_forward,
    run_kernels,
)

from hf_sparse_attention.ops.triton import triton_attention

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """Fresh memory holds NaN (integers: their largest value): reading what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


CASES = [
    *(Case(n, n, 3, 1, 64, dtype=BF16) for n in (1, 7, 63, 65, 1000)),
    Case(4097, 4097, 2, 1, 64, dtype=BF16),
    *(
        Case(517, 517, 2, 2, 64, dtype=BF16, alpha=alpha, scores=scores)
        for alpha in (1.5, 2.0)
        for scores in ("sharp", "heavy", "tied", "equal", "huge", "needle")
    ),
    *(Case(300, 517, 4, 2, 64, dtype=BF16, scores="sharp", ranges=r, batch=2) for r in ("full", "window", "padded")),
    *(Case(517, 517, 2, 1, 64, dtype=BF16, ranges=r, batch=2, scale=True) for r in ("packed", "holes")),
    *(
        Case(700, 700, 5, 1, 64, dtype=BF16, alpha=alpha, scores="sharp", scale=True, slopes=True)
        for alpha in (1.0, 1.25, 1.5, 1.8, 2.0)
    ),
    Case(333, 700, 4, 2, 64, dtype=BF16, slopes=True, positions=True, ranges="full"),
    *(Case(300, 300, 2, 1, d, dtype=BF16, scores="sharp") for d in (16, 32, 80, 96, 100, 128, 256)),
    Case(300, 300, 2, 1, 64, 128, dtype=BF16, scores="sharp"),
    *(Case(300, 300, 7, 1, d, dtype=FP16, scores="sharp", alpha=a) for d in (64, 128) for a in (1.0, 1.5)),
    Case(1000, 1000, 2, 1, 64, dtype=FP16, scores="equal", ranges="full"),
    *(Case(300, 300, 2, 1, d, dtype=FP32, scores="sharp", scale=True) for d in (16, 64, 128, 256)),
    *(Case(300, 300, 2, 1, 64, dtype=FP32, scores=s, alpha=a) for s in ("huge", "tied") for a in (1.0, 1.5, 2.0)),
    Case(517, 517, 2, 2, 64, dtype=BF16, alpha=1.0, ranges="holes", scale=True),
    # Values narrower or wider than keys, few keys and many.
    *(
        Case(n, n, 4, 2, d, v, dtype=BF16, alpha=alpha, batch=2, scale=True, slopes=True)
        for n in (37, 300)
        for d, v in ((24, 16), (32, 16), (64, 32), (128, 64), (16, 64))
        for alpha in ((1.0, 1.25, 1.5) if n == 37 else (1.5,))
    ),
    # Few keys that one kernel does not hold: float32, and large heads.
    *(Case(100, 128, 2, 1, d, dtype=FP32, scores="sharp", scale=True) for d in (16, 64, 100)),
    *(Case(60, 64, 2, 1, 256, dtype=t, scores="sharp") for t in (BF16, FP32)),
    # So few keys that one kernel holds them all.
    *(
        Case(131, 131, 4, 2, d, dtype=BF16, alpha=alpha, scores="sharp", scale=True, slopes=True, batch=3)
        for d in (16, 24, 32, 64, 80, 128)
        for alpha in (1.25, 1.5, 2.0)
    ),
    *(Case(200, 200, 2, 1, 64, dtype=BF16, scores=s) for s in ("heavy", "tied", "equal", "huge", "needle")),
    *(Case(77, 256, 2, 1, 64, dtype=BF16, ranges=r, batch=2) for r in ("full", "window", "padded", "packed", "holes")),
    *(Case(150, 150, 2, 1, 128, dtype=FP16, alpha=a, scores="equal", ranges="full") for a in (1.5, 2.0)),
    # More tiles than the sweep looks at in one go, and lists long enough for a pilot pass.
    *(Case(300, 20000, 2, 1, 64, dtype=BF16, scores=s, scale=s == "sharp") for s in ("normal", "sharp", "needle")),
    *(Case(130, 20000, 2, 1, 64, dtype=BF16, scores=s, ranges="full") for s in ("heavy", "tied", "equal")),
    *(Case(130, 9000, 2, 1, 64, dtype=t, alpha=a, ranges="full") for t in (FP16, FP32) for a in (1.2, 1.5, 2.0)),
    Case(300, 20000, 2, 1, 128, dtype=BF16, scores="sharp", slopes=True),
    Case(700, 700, 5, 1, 128, dtype=BF16, scores="sharp", scale=True, slopes=True),
    # A window and documents of fewer keys than a tile: every tile is partial.
    *(Case(300, 300, 2, 1, d, dtype=BF16, batch=2, ranges=r) for d in (64, 128) for r in ("window", "packed")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_dense(case):
    check_against_dense(case, "cuda")


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_reruns_are_bit_identical(alpha):
    case = Case(2049, 2049, 4, 2, 64, dtype=BF16, alpha=alpha, scores="sharp", scale=True, slopes=True)
    inputs = make_inputs(case, "cuda")
    first = run_kernels(case, inputs)
    for _ in range(5):
        for a, b in zip(first, run_kernels(case, inputs)):
            assert torch.equal(a, b)


DECODE_CASES = [
    *(Case(1, n, 8, 2, 64, dtype=BF16, batch=2) for n in (1, 63, 1000, 4097)),
    *(Case(q, 3000, 8, 2, 128, dtype=BF16, alpha=a, scores="sharp") for q in (1, 5, 16) for a in (1.0, 1.5, 2.0)),
    Case(1, 5000, 6, 2, 80, dtype=BF16, batch=3, ranges="padded", scale=True, slopes=True),
    Case(3, 500, 4, 4, 64, dtype=BF16, ranges="holes", scale=True),
    Case(1, 20000, 4, 1, 64, dtype=FP16, scores="equal", ranges="full"),
    Case(1, 3000, 4, 2, 256, dtype=BF16, alpha=1.25),
    Case(2, 3000, 4, 2, 64, dtype=FP32, scores="huge"),
]


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode_matches_dense(case):
    check_decode_against_dense(case, "cuda")


def test_decode_in_a_cuda_graph_follows_its_inputs():
    case = Case(1, 2000, 8, 2, 64, dtype=BF16, batch=2, scores="sharp", scale=True)
    inputs, others = make_inputs(case, "cuda"), make_inputs(case, "cuda", seed=1)
    with torch.no_grad():
        run_forward(case, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run_forward(case, inputs)
        for tensor, other in zip(inputs.differentiable(), others.differentiable()):
            tensor.copy_(other)
        inputs.key_end.fill_(1500)
        others.key_end.fill_(1500)
        graph.replay()
        assert torch.equal(output, run_forward(case, others))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_compiled_training_step_has_one_graph_and_equal_gradients(alpha):
    case = Case(300, 300, 4, 2, 64, dtype=BF16, alpha=alpha, scores="sharp", scale=True)
    inputs = make_inputs(case, "cuda")
    expected = run_kernels(case, inputs)
    compiled = torch.compile(lambda: run_forward(case, inputs), fullgraph=True)
    output = compiled()
    found = [output.detach(), *torch.autograd.grad(output, inputs.differentiable(), inputs.grad)]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_compiled_decode_has_one_graph():
    case = Case(1, 700, 4, 2, 64, dtype=BF16)
    inputs = make_inputs(case, "cuda")
    with torch.no_grad():
        compiled = torch.compile(lambda: run_forward(case, inputs), fullgraph=True)
        assert torch.equal(compiled(), run_forward(case, inputs))


def test_offsets_beyond_32_bits():
    """The last of nine heads starts more than 2^31 elements into keys and values."""
    case = Case(200, 2**21, 9, 9, 128, dtype=BF16, ranges="full")
    torch.manual_seed(0)
    query, grad = (torch.randn(1, 9, 200, 128, device="cuda", dtype=BF16) for _ in range(2))
    key, value = (torch.randn(1, 9, 2**21, 128, device="cuda", dtype=BF16) for _ in range(2))
    start = torch.zeros(1, 200, dtype=torch.int32, device="cuda")

    def run(*heads):
        tensors = [tensor.detach().requires_grad_() for tensor in heads[:3]]
        inputs = Inputs(*tensors, None, None, start, torch.full_like(start, 2**21), None, heads[3])
        return run_kernels(case, inputs)

    expected = run(*(tensor[:, 8:].clone() for tensor in (query, key, value, grad)))
    for found, alone in zip(run(query, key, value, grad), expected):
        assert torch.equal(found[:, 8:], alone)
    with torch.no_grad():
        ranges = (None, None, start[:, :1], start[:, :1] + 2**21, None)
        decoded = triton_attention(query[:, :, :1], key, value, 1.5, 0.1, *ranges)
        last = (tensor[:, 8:].clone() for tensor in (query[:, :, :1], key, value))
        torch.testing.assert_close(decoded[:, 8:], triton_attention(*last, 1.5, 0.1, *ranges))


def test_one_head_that_spans_more_than_32_bits():
    """Rows so far apart that the last of one head starts more than 2^31 elements after its first."""
    case = Case(1100, 1100, 1, 1, 64, dtype=BF16, scores="sharp")
    near = make_inputs(case, "cuda")
    memory = torch.empty(1100, 2**21, device="cuda", dtype=BF16)

    def apart(tensor, column):
        wide = memory[None, None, :, column : column + 64]
        wide.copy_(tensor.detach())
        return wide

    tensors = [apart(tensor, 64 * column).requires_grad_() for column, tensor in enumerate(near.differentiable())]
    far = Inputs(*tensors, None, None, near.key_start, near.key_end, None, apart(near.grad, 192))
    for first, second in zip(run_kernels(case, near), run_kernels(case, far)):
        assert torch.equal(first, second)


def test_memory_does_not_grow_with_the_square_of_the_length():
    extra = []
    for length in (8192, 16384):
        case = Case(length, length, 2, 2, 64, dtype=BF16)
        inputs = make_inputs(case, "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_kernels(case, inputs)
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] < 2.2 * extra[0]


def _train(backend: str, steps: int = 300) -> float:
    """Mean loss of the last 30 steps of a small Llama that learns to repeat sequences."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import hf_sparse_attention  # noqa: F401

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="asentmax",
        sparse_attention={"backend": backend, "position_encoding": "nape"},
    )
    model = AutoModelForCausalLM.from_config(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        half = torch.randint(64, (16, 48), generator=generator)
        tokens = torch.cat([half, half], 1).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-30:]) / 30


def test_training_reaches_the_loss_of_the_chunked_path():
    kernels, chunked = _train("triton"), _train("chunked")
    assert abs(kernels - chunked) < 0.01 * chunked
