"""Time and memory of the Triton kernels on a GPU beside other attention kernels, on the same inputs in one run.

    python recipes/benchmark_kernels.py --output_dir outputs/benchmark_kernels

Medians of CUDA events. Inputs of a given share of empty tiles are made of clusters: every 256 keys share a direction,
and every 256 queries look for the direction of keys they see; the share that results is measured and reported.
AdaSplash is measured where its package is installed and --adasplash_lengths names the length: it tunes for minutes at
each new shape. Writes benchmark_kernels.json, .md and .png into output_dir.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# An empty cache, so that the first call compiles.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="benchmark_kernels_")

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.profiler import ProfilerActivity
from torch.profiler import profile as trace
from triton.testing import do_bench, do_bench_cudagraph

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.evaluation.plots import figure_grid, save_figure
from hf_sparse_attention.evaluation.report import format_table, run_record, write_json
from hf_sparse_attention.ops import sparse_attention
from hf_sparse_attention.ops.triton.operator import forward_op
from hf_sparse_attention.ops.triton.tiling import tiling

SEGMENT = 256
DTYPE = torch.bfloat16
# Calls over which a profile is averaged.
PROFILED = 6


@dataclass
class KernelBenchmarkArguments:
    lengths: list[int] = field(
        default_factory=lambda: [1024, 4096, 16384, 65536, 131072], metadata={"help": "Sequence lengths."}
    )
    head_dims: list[int] = field(default_factory=lambda: [64, 128], metadata={"help": "Sizes of a head."})
    empty: list[int] = field(
        default_factory=lambda: [0, 50, 90, 93, 97], metadata={"help": "Empty tiles asked for, in %."}
    )
    heads: int = field(default=16, metadata={"help": "Query heads, fewer above --tokens tokens."})
    tokens: int = field(default=16384, metadata={"help": "Batch times length times heads / --heads."})
    flex_lengths: list[int] = field(default_factory=lambda: [16384], metadata={"help": "Lengths with FlexAttention."})
    adasplash_lengths: list[int] = field(default_factory=list, metadata={"help": "Lengths with AdaSplash."})
    adasplash_versions: list[int] = field(default_factory=lambda: [2], metadata={"help": "Versions: 1, 2."})
    sections: list[str] = field(
        default_factory=lambda: ["first_call", "training", "nape", "memory", "decode", "profile"],
        metadata={"help": "What to measure: first_call, training, nape, memory, decode, profile."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the inputs."})
    output_dir: str = field(default="outputs/benchmark_kernels", metadata={"help": "Folder for what is written."})

    def __post_init__(self) -> None:
        for name in self.sections:
            if name not in SECTIONS:
                raise ValueError(f"sections: {name!r} is not known; allowed: {', '.join(SECTIONS)}.")
        if not torch.cuda.is_available():
            raise ValueError("benchmark_kernels.py needs a CUDA device; benchmark_attention.py runs on the CPU.")


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


def contestants(args: KernelBenchmarkArguments, length: int) -> dict[str, Callable[..., Tensor]]:
    found = {
        "ours (entmax 1.5)": ours,
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


def measure(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds of forward and backward, and MiB beyond inputs, output and gradients at the peak."""
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
    return {**result, "sum_ms": result["forward_ms"] + result["backward_ms"]}


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


def first_call(args: KernelBenchmarkArguments) -> list[dict[str, Any]]:
    """Seconds of the first forward and backward of the process, then of the first ones at new lengths."""
    rows = []
    for length in (16384, 12345, 16421, 8192):
        inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 16, 16, length, 64, 90)]
        torch.cuda.synchronize()

        def call(inputs: list[Tensor] = inputs) -> float:
            start = time.perf_counter()
            output = ours(*inputs)
            torch.autograd.grad(output, inputs, output)
            torch.cuda.synchronize()
            return time.perf_counter() - start

        rows.append({"length": length, "first_s": call(), "second_s": call(), "third_s": call()})
    return rows


def training(args: KernelBenchmarkArguments) -> list[dict[str, Any]]:
    rows = []
    for length in args.lengths:
        known = contestants(args, length)
        batch = max(1, args.tokens // length)
        heads = max(1, min(args.heads, args.heads * args.tokens // (batch * length)))
        shapes = [(dim, heads, empty) for dim in args.head_dims for empty in args.empty]
        if length == args.tokens and heads % 4 == 0:
            shapes.append((128, heads // 4, 90))
        for dim, key_heads, empty in shapes:
            inputs = make_inputs(batch, heads, key_heads, length, dim, empty)
            case = {"length": length, "batch": batch, "heads": heads, "key_heads": key_heads, "head_dim": dim}
            case |= {"empty_asked": empty / 100, "empty_measured": empty_share(*inputs)}
            for name, attend in known.items():
                if key_heads != heads and "SDPA" not in name and "ours" not in name:
                    continue
                row = {**case, "contestant": name, **measure(attend, inputs)}
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                rows.append(row)
    return rows


def nape(args: KernelBenchmarkArguments) -> list[dict[str, Any]]:
    """ALiBi heads alone, and with as many heads without positions: slopes 1, 1/2, 1/3, ..."""
    rows = []
    for length in (16384, 65536):
        for heads, name in ((8, "8 ALiBi heads"), (16, "8 ALiBi heads and 8 others")):
            inputs = make_inputs(1, heads, heads, length, 64, 90)
            slopes = torch.zeros(heads, device="cuda")
            slopes[:8] = 1 / torch.arange(1, 9, device="cuda")

            def attend(*tensors: Tensor, slopes: Tensor = slopes) -> Tensor:
                return sparse_attention(*tensors, is_causal=True, slopes=slopes, impl="triton")

            rows.append({"length": length, "heads": name, **measure(attend, inputs)})
            rows[-1]["empty_measured"] = empty_share(*inputs, slopes)
    return rows


def memory(args: KernelBenchmarkArguments) -> list[dict[str, Any]]:
    """One call at 131072 tokens and 16 heads."""
    inputs = make_inputs(1, 16, 16, 131072, 64, 90)
    return [{"length": 131072, "heads": 16, "head_dim": 64, **measure(ours, inputs)}]


def decode(args: KernelBenchmarkArguments) -> list[dict[str, Any]]:
    """One query of 32 heads against 65536 keys of 8 heads, batch 8: in a CUDA graph, and launched from Python."""
    rows = []
    for empty in (0, 90):
        query, key, value = make_inputs(8, 32, 8, 65536, 128, empty)
        query = query[:, :, -1:].contiguous()
        known = {
            "ours (entmax 1.5)": lambda *tensors: sparse_attention(*tensors, impl="triton"),
            "SDPA cuDNN (softmax)": lambda *tensors: sdpa(SDPBackend.CUDNN_ATTENTION)(*tensors, is_causal=False),
            "SDPA FlashAttention-2 (softmax)": lambda *tensors: sdpa(SDPBackend.FLASH_ATTENTION)(
                *tensors, is_causal=False
            ),
        }
        for name, attend in known.items():
            with torch.no_grad():
                run = functools.partial(attend, query, key, value)
                eager = milliseconds(run)
                graph = do_bench_cudagraph(run, rep=60, return_mode="median")
            rows.append({"empty_asked": empty / 100, "contestant": name, "graph_ms": graph, "eager_ms": eager})
    return rows


def profile(args: KernelBenchmarkArguments) -> list[dict[str, Any]]:
    """Milliseconds of each of our kernels in a forward and backward, at --tokens tokens in one row."""
    rows = []
    for dim, empty in itertools.product(args.head_dims, args.empty):
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
        rows.append({**case, "empty_measured": empty_share(*inputs), **times})
    return rows


SECTIONS: dict[str, Callable[[KernelBenchmarkArguments], list[dict[str, Any]]]] = {
    "first_call": first_call,
    "training": training,
    "nape": nape,
    "memory": memory,
    "decode": decode,
    "profile": profile,
}


def table(rows: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return format_table(keys, [[cell(row.get(key, "")) for key in keys] for row in rows])


def plot(path: Path, rows: list[dict[str, Any]], lengths: list[int]) -> None:
    """Forward and backward against the share of empty tiles, one panel per length of at least 16384."""
    lengths = [length for length in lengths if length >= 16384] or lengths
    figure, panels = figure_grid(1, len(lengths), width=4.5 * len(lengths), height=3.8)
    for axes, length in zip(panels[0], lengths):
        chosen = [row for row in rows if row["length"] == length and row["head_dim"] == 64]
        for number, name in enumerate(dict.fromkeys(row["contestant"] for row in chosen)):
            line = sorted((row["empty_measured"], row["sum_ms"]) for row in chosen if row["contestant"] == name)
            axes.plot(*zip(*line), marker="o", markersize=4, color=f"C{number}", label=name)
        axes.set_title(f"{length} tokens, head dimension 64", fontsize=9)
        axes.set_xlabel("share of empty tiles")
        axes.set_ylabel("forward + backward (ms)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def main() -> None:
    (args,) = parse_arguments(KernelBenchmarkArguments, description=__doc__)
    torch.manual_seed(args.seed)
    folder = Path(args.output_dir)
    record = run_record(dataclasses.asdict(args), torch.device("cuda"), processes=1)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.sections:
        results[name] = SECTIONS[name](args)
        torch.cuda.empty_cache()
        if name != "training":
            print(f"{name}\n{table(results[name])}\n", flush=True)
        # After each section, so that a later one that fails loses nothing.
        write_json(folder / "benchmark_kernels.json", {**results, "run": record})
    tables = "\n\n".join(f"## {name}\n\n{table(rows)}" for name, rows in results.items())
    (folder / "benchmark_kernels.md").write_text(tables + "\n", encoding="utf-8")
    if results.get("training"):
        plot(folder / "benchmark_kernels.png", results["training"], args.lengths)


if __name__ == "__main__":
    main()
