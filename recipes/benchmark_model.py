"""Training step of a whole model on a GPU: sdpa beside sparse attention, and how much of it attention takes.

    python recipes/benchmark_model.py --output_dir outputs/benchmark_model

Forward, backward and AdamW under bfloat16 autocast on rows of random tokens, untrained weights; eager, and with each
layer compiled. Without training the heads without positions attend to everything; ALiBi heads are sparse from the
start, so that the model whose heads all have ALiBi stands for one whose attention is sparse: the measured share is in
the table. Writes benchmark_model.json and .md into output_dir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from attention_results import table
from benchmark_attention import share_of_counts
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.evaluation.report import run_record, write_json
from hf_sparse_attention.ops.triton import operator

MODELS: dict[str, dict[str, Any]] = {
    "sdpa, RoPE": {"attn_implementation": "sdpa"},
    "asentmax, half of the heads ALiBi": {
        "attn_implementation": "asentmax",
        "sparse_attention": {"position_encoding": "nape"},
    },
    "asentmax, all heads ALiBi": {
        "attn_implementation": "asentmax",
        "sparse_attention": {"position_encoding": "alibi"},
    },
}
ATTENTION_KERNELS = re.compile(
    "sweep_kernel|solve_kernel|output_kernel|gradient_kernel|list_kernel|norms_kernel|flash|fmha"
)


@dataclass
class ModelBenchmarkArguments:
    model_config: str = field(
        default=os.path.relpath(Path(__file__).parent / "configs" / "model" / "llama_420m.yaml"),
        metadata={"help": "YAML file of the Llama."},
    )
    length: int = field(default=8192, metadata={"help": "Tokens of a row."})
    rows: int = field(default=4, metadata={"help": "Rows of a step; with one, launching takes longer than computing."})
    steps: int = field(default=10, metadata={"help": "Steps of which the median is taken, after four others."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and tokens."})
    output_dir: str = field(default="outputs/benchmark_model", metadata={"help": "Folder for what is written."})

    def __post_init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("benchmark_model.py needs a CUDA device.")


@contextlib.contextmanager
def observed_shares() -> Iterator[list[float]]:
    """Shares of empty tiles of every call of the kernels within."""
    shares: list[float] = []
    forward = operator.forward

    def observe(query: Tensor, *others: Any) -> tuple[Tensor, ...]:
        result = forward(query, *others)
        shares.append(share_of_counts(result[4], query.shape[0] * query.shape[1], query.shape[2], query.shape[3]))
        return result

    operator.forward = observe
    try:
        yield shares
    finally:
        operator.forward = forward


def measure(fields: dict[str, Any], compiled: bool, args: ModelBenchmarkArguments) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    config = LlamaConfig(**yaml.safe_load(Path(args.model_config).read_text(encoding="utf-8")), **fields)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
        tokens = torch.randint(config.vocab_size, (args.rows, args.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with observed_shares() as shares:
        step()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    for _ in range(3):
        step()
    times = []
    for _ in range(args.steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    kernels = {event.key: event.self_device_time_total / 1e3 for event in trace.key_averages()}
    in_attention = sum(time for name, time in kernels.items() if ATTENTION_KERNELS.search(name))
    return {
        "parameters": model.num_parameters(),
        "step_ms": statistics.median(times),
        "attention_ms": in_attention,
        "attention_share": in_attention / sum(kernels.values()),
        "empty_measured": statistics.mean(shares) if shares else 0.0,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


def main() -> None:
    (args,) = parse_arguments(ModelBenchmarkArguments, description=__doc__)
    rows = []
    for compiled, (name, fields) in itertools.product((False, True), MODELS.items()):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        case = {
            "attention": name,
            "layers": "compiled" if compiled else "eager",
            "rows": args.rows,
            "length": args.length,
        }
        rows.append({**case, **measure(fields, compiled, args)})
        print(rows[-1], flush=True)
    folder = Path(args.output_dir)
    record = run_record(dataclasses.asdict(args), torch.device("cuda"), processes=1)
    write_json(folder / "benchmark_model.json", {"models": rows, "run": record})
    (folder / "benchmark_model.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
