"""Time and memory of the Triton kernels on a GPU beside other attention kernels, on the same inputs in one run.

    python recipes/benchmark_attention.py --output_dir outputs/benchmark_attention

Medians of CUDA events. Inputs of a given share of empty tiles are made of clusters: every 256 keys share a direction,
and every 256 queries look for the direction of keys they see; the share that results is measured and reported.
AdaSplash is measured where its package is installed, at --adasplash_lengths and --adasplash_head_dims: it tunes for
minutes at each new shape. Writes benchmark_attention.json (after every row), .md and .png into output_dir. With
--max_seconds no measurement is begun after that time; what is left out is recorded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# An empty cache, so that the first call compiles.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="benchmark_attention_")

import torch
from attention_results import Case, LeftOut, Results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.profiler import ProfilerActivity
from torch.profiler import profile as trace
from triton.testing import do_bench, do_bench_cudagraph

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.evaluation.report import run_record
from hf_sparse_attention.ops import sparse_attention
from hf_sparse_attention.ops.triton.operator import forward_op
from hf_sparse_attention.ops.triton.tiling import tiling

SEGMENT = 256
DTYPE = torch.bfloat16
OURS = "ours (entmax 1.5)"
# Calls over which a profile is averaged.
PROFILED = 6
# Above this share of the measured time, the time is that of Python launching kernels.
HOST_BOUND = 0.8


@dataclass
class BenchmarkArguments:
    lengths: list[int] = field(
        default_factory=lambda: [1024, 4096, 16384, 65536, 131072], metadata={"help": "Sequence lengths."}
    )
    head_dims: list[int] = field(default_factory=lambda: [64, 128], metadata={"help": "Sizes of a head."})
    empty: list[int] = field(
        default_factory=lambda: [0, 50, 90, 93, 97], metadata={"help": "Empty tiles asked for, in per cent."}
    )
    heads: int = field(default=16, metadata={"help": "Query heads, fewer above --tokens tokens."})
    tokens: int = field(default=16384, metadata={"help": "Batch times length times heads / --heads."})
    flex_lengths: list[int] = field(default_factory=lambda: [16384], metadata={"help": "Lengths with FlexAttention."})
    adasplash_lengths: list[int] = field(default_factory=list, metadata={"help": "Lengths with AdaSplash."})
    adasplash_versions: list[int] = field(default_factory=lambda: [2], metadata={"help": "Versions: 1, 2."})
    adasplash_head_dims: list[int] = field(default_factory=lambda: [64, 128], metadata={"help": "Sizes of its heads."})
    sections: list[str] = field(
        default_factory=lambda: ["first_call", "training", "nape", "memory", "decode", "profile"],
        metadata={"help": "What to measure: first_call, training, nape, memory, decode, profile."},
    )
    skip_host_bound: bool = field(
        default=False, metadata={"help": "Leave out of training what Python takes as long to launch as to run."}
    )
    max_seconds: float | None = field(default=None, metadata={"help": "Begin no measurement after so many seconds."})
    seed: int = field(default=0, metadata={"help": "Seed of the inputs."})
    output_dir: str = field(default="outputs/benchmark_attention", metadata={"help": "Folder for what is written."})

    def __post_init__(self) -> None:
        for name in self.sections:
            if name not in SECTIONS:
                raise ValueError(f"sections: {name!r} is not known; allowed: {', '.join(SECTIONS)}.")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError(f"max_seconds is {self.max_seconds}; allowed: a number above 0.")
        if not torch.cuda.is_available():
            raise ValueError("benchmark_attention.py needs a CUDA device; benchmark_attention_cpu.py runs on the CPU.")


def make_inputs(
    batch: int, heads: int, key_heads: int, length: int, dim: int, empty: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, H, N, D); normal scores for empty = 0, else clusters as many as make that share."""
    normal = [torch.randn(batch, h, length, dim, device="cuda") for h in (heads, key_heads, key_heads)]
    if empty == 0:
        return tuple(tensor.to(DTYPE) for tensor in normal)
    clusters = round(1 / (1 - empty / 100))
    # Scores of 10 within a cluster, with deviations of 1; between clusters 0 with deviations of 1.2.
    centers = normalize(torch.randn(key_heads, clusters, dim, device="cuda"), dim=-1) * math.sqrt(10 * dim**0.5)
    segments = -(-length // SEGMENT)
    of_keys = torch.randint(clusters, (batch, key_heads, segments), device="cuda")
    seen = (torch.rand(batch, heads, segments, device="cuda") * torch.arange(1, segments + 1, device="cuda")).long()
    of_queries = of_keys.repeat_interleave(heads // key_heads, 1).gather(2, seen)
    made = []
    for noise, chosen in zip(normal[:2], (of_queries, of_keys)):
        head = torch.arange(chosen.shape[1], device="cuda") // (chosen.shape[1] // key_heads)
        token = chosen.repeat_interleave(SEGMENT, 2)[..., :length]
        made.append((centers[head[None, :, None], token] + 0.5 * noise).to(DTYPE))
    return made[0], made[1], normal[2].to(DTYPE)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sparse_attention(query, key, value, is_causal=True, impl="triton")


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = True) -> Tensor:
        with sdpa_kernel(backend):
            gqa = query.shape[1] != key.shape[1]
            return scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=gqa)

    return attend


def flex() -> Callable[..., Tensor]:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # The backward is called repeatedly.
    config.donated_buffer = False
    compiled = torch.compile(flex_attention)
    masks: dict[int, Any] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda")
        return compiled(query, key, value, block_mask=masks[length])

    return attend


def adasplash(version: int) -> Callable[..., Tensor]:
    import adasplash as package

    if version == 2:
        return lambda query, key, value: package.adasplash_v2(query, key, value)
    return lambda query, key, value: package.adasplash_v1(query, key, value, alpha=1.5, is_causal=True)


def contestants(args: BenchmarkArguments, length: int) -> dict[str, Callable[..., Tensor]]:
    found = {
        OURS: ours,
        "SDPA cuDNN (softmax)": sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA FlashAttention-2 (softmax)": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    if length in args.flex_lengths:
        found["FlexAttention (softmax)"] = flex()
    if length in args.adasplash_lengths:
        for version in args.adasplash_versions:
            found[f"AdaSplash-{version} (entmax 1.5)"] = adasplash(version)
    if length <= 1024:
        found["dense entmax15"] = dense
    return found


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from entmax import entmax15

    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device="cuda").triu(1)
    scores = ((query @ key.mT).float() * query.shape[3] ** -0.5).masked_fill(hidden, -torch.inf)
    return entmax15(scores, dim=-1).to(value.dtype) @ value


def milliseconds(run: Callable[[], Any]) -> float:
    return do_bench(run, warmup=10, rep=60, return_mode="median")


def host_milliseconds(run: Callable[[], Any]) -> float:
    """Median time until Python has launched everything."""
    torch.cuda.synchronize()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e3


def measure(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds of forward, backward and of launching both; MiB beyond inputs, output and gradients at the peak."""
    tensors = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attend(*tensors)
    grad = torch.randn_like(output)
    torch.autograd.grad(output, tensors, grad)
    del output
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = attend(*tensors)
    grads = torch.autograd.grad(output, tensors, grad)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in (output, *grads))
    extra = torch.cuda.max_memory_allocated() - before - kept
    del grads
    output = attend(*tensors)
    result = {
        "forward_ms": milliseconds(lambda: attend(*tensors)),
        "backward_ms": milliseconds(lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True)),
        "extra_mib": extra / 2**20,
    }
    result["sum_ms"] = result["forward_ms"] + result["backward_ms"]
    result["host_ms"] = host_milliseconds(lambda: torch.autograd.grad(attend(*tensors), tensors, grad))
    return result


def empty_share(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None = None) -> float:
    """Share of the visible tiles in which no query has a weight, as the kernels list them."""
    length = query.shape[2]
    end = torch.arange(1, length + 1, device="cuda", dtype=torch.int32)[None]
    arguments = (query, key, value, None, slopes, torch.zeros_like(end), end, None)
    counts = forward_op(*arguments, 1.5, query.shape[3] ** -0.5, True)[4]
    return share_of_counts(counts, query.shape[0] * query.shape[1], length, query.shape[3])


def share_of_counts(counts: Tensor, heads: int, length: int, dim: int) -> float:
    """The same from the lengths of the kernels' lists, for causal attention."""
    tiles = tiling(dim, DTYPE)
    last = (torch.arange(1, counts.numel() // heads + 1, device=counts.device) * tiles.rows).clamp(max=length)
    return 1 - counts.sum().item() / (heads * last.div(tiles.columns).ceil().sum().item())


def first_call(args: BenchmarkArguments) -> Iterator[Case]:
    """Seconds of the first forward and backward of the process, then of the first ones at new lengths."""

    def row(length: int) -> dict[str, Any]:
        inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 16, 16, length, 64, 90)]
        torch.cuda.synchronize()

        def call() -> float:
            start = time.perf_counter()
            output = ours(*inputs)
            torch.autograd.grad(output, inputs, output)
            torch.cuda.synchronize()
            return time.perf_counter() - start

        return {"length": length, "first_s": call(), "second_s": call(), "third_s": call()}

    for length in (16384, 12345, 16421, 8192):
        yield Case(f"{length} tokens", functools.partial(row, length))


def training(args: BenchmarkArguments) -> Iterator[Case]:
    for length in args.lengths:
        batch = max(1, args.tokens // length)
        heads = max(1, min(args.heads, args.heads * args.tokens // (batch * length)))
        shapes = [(heads, dim, empty) for dim in args.head_dims for empty in args.empty]
        if length == args.tokens and heads % 4 == 0:
            shapes.append((heads // 4, 128, 90))
        known = contestants(args, length)
        for key_heads, dim, empty in shapes:
            names = [n for n in known if key_heads == heads or n == OURS or "SDPA" in n]
            names = [n for n in names if dim in args.adasplash_head_dims or "AdaSplash" not in n]
            case = {"length": length, "batch": batch, "heads": heads, "key_heads": key_heads, "head_dim": dim}
            yield from training_cases(args, {n: known[n] for n in names}, case, empty)


def training_cases(
    args: BenchmarkArguments, known: dict[str, Callable[..., Tensor]], case: dict[str, int], empty: int
) -> Iterator[Case]:
    """The contestants on the same inputs; ours is the first."""
    host_bound = False

    @functools.cache
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        return make_inputs(*(case[size] for size in ("batch", "heads", "key_heads", "length", "head_dim")), empty)

    @functools.cache
    def shares() -> dict[str, float]:
        return {"empty_asked": empty / 100, "empty_measured": empty_share(*inputs())}

    def row(name: str) -> dict[str, Any]:
        nonlocal host_bound
        if not host_bound:
            found = {**case, **shares(), "contestant": name, **measure(known[name], inputs())}
            host_bound = args.skip_host_bound and name == OURS and found["host_ms"] > HOST_BOUND * found["sum_ms"]
        if host_bound:
            raise LeftOut("launching takes as long as running")
        return found

    shape = f"{case['length']} tokens, {case['key_heads']} key heads of {case['head_dim']}, {empty}% empty"
    for name in known:
        yield Case(f"{shape}, {name}", functools.partial(row, name))


def nape(args: BenchmarkArguments) -> Iterator[Case]:
    """ALiBi heads alone, and with as many heads without positions: slopes 1, 1/2, 1/3, ..."""

    def row(length: int, heads: int, name: str) -> dict[str, Any]:
        inputs = make_inputs(1, heads, heads, length, 64, 90)
        slopes = torch.zeros(heads, device="cuda")
        slopes[:8] = 1 / torch.arange(1, 9, device="cuda")

        def attend(*tensors: Tensor) -> Tensor:
            return sparse_attention(*tensors, is_causal=True, slopes=slopes, impl="triton")

        found = {"length": length, "heads": name, **measure(attend, inputs)}
        return {**found, "empty_measured": empty_share(*inputs, slopes)}

    for length in (16384, 65536):
        for heads, name in ((8, "8 ALiBi heads"), (16, "8 ALiBi heads and 8 others")):
            yield Case(f"{length} tokens, {name}", functools.partial(row, length, heads, name))


def memory(args: BenchmarkArguments) -> Iterator[Case]:
    """One call at 131072 tokens and 16 heads."""

    def row() -> dict[str, Any]:
        inputs = make_inputs(1, 16, 16, 131072, 64, 90)
        return {"length": 131072, "heads": 16, "head_dim": 64, **measure(ours, inputs)}

    yield Case("131072 tokens", row)


def decode(args: BenchmarkArguments) -> Iterator[Case]:
    """One query of 32 heads against 65536 keys of 8 heads, batch 8: in a CUDA graph, and launched from Python."""
    known = {
        OURS: lambda *tensors: sparse_attention(*tensors, impl="triton"),
        "SDPA cuDNN (softmax)": functools.partial(sdpa(SDPBackend.CUDNN_ATTENTION), is_causal=False),
        "SDPA FlashAttention-2 (softmax)": functools.partial(sdpa(SDPBackend.FLASH_ATTENTION), is_causal=False),
    }

    @functools.lru_cache(maxsize=1)
    def inputs(empty: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = make_inputs(8, 32, 8, 65536, 128, empty)
        return query[:, :, -1:].contiguous(), key, value

    def row(empty: int, name: str) -> dict[str, Any]:
        with torch.no_grad():
            run = functools.partial(known[name], *inputs(empty))
            eager = milliseconds(run)
            graph = do_bench_cudagraph(run, rep=60, return_mode="median")
        return {"empty_asked": empty / 100, "contestant": name, "graph_ms": graph, "eager_ms": eager}

    for empty, name in itertools.product((0, 90), known):
        yield Case(f"{empty}% empty, {name}", functools.partial(row, empty, name))


def profile(args: BenchmarkArguments) -> Iterator[Case]:
    """Milliseconds of each of our kernels in a forward and backward, at --tokens tokens in one row."""

    def row(dim: int, empty: int) -> dict[str, Any]:
        inputs = make_inputs(1, args.heads, args.heads, args.tokens, dim, empty)
        tensors = [tensor.requires_grad_() for tensor in inputs]
        grad = torch.randn_like(ours(*tensors))
        with trace(activities=[ProfilerActivity.CUDA]) as events:
            for _ in range(PROFILED):
                torch.autograd.grad(ours(*tensors), tensors, grad)
            torch.cuda.synchronize()
        case = {"length": args.tokens, "heads": args.heads, "head_dim": dim, "empty_asked": empty / 100}
        times = {
            event.key.removesuffix("_kernel") + "_ms": event.self_device_time_total / PROFILED / 1e3
            for event in events.key_averages()
            if event.key.endswith("_kernel")
        }
        return {**case, "empty_measured": empty_share(*inputs), **times}

    for dim, empty in itertools.product(args.head_dims, args.empty):
        yield Case(f"head dimension {dim}, {empty}% empty", functools.partial(row, dim, empty))


SECTIONS: dict[str, Callable[[BenchmarkArguments], Iterator[Case]]] = {
    "first_call": first_call,
    "training": training,
    "nape": nape,
    "memory": memory,
    "decode": decode,
    "profile": profile,
}


def main() -> None:
    (args,) = parse_arguments(BenchmarkArguments, description=__doc__)
    torch.manual_seed(args.seed)
    record = run_record(dataclasses.asdict(args), torch.device("cuda"), processes=1)
    results = Results(Path(args.output_dir) / "benchmark_attention", record, args.max_seconds)
    try:
        for name in args.sections:
            for case in SECTIONS[name](args):
                results.measure(name, case)
            torch.cuda.empty_cache()
    finally:
        results.write_tables()


if __name__ == "__main__":
    main()
