"""Time and memory of attention on the CPU, forward and backward, of several implementations in one run.

    python recipes/benchmark_attention_cpu.py --lengths 1024 2048 4096 8192

Each implementation runs in a process of its own; they take turns, so that a busy moment of the machine hits all.
Medians of --repeats turns are reported. Writes benchmark_attention_cpu.json, .md and .png into output_dir.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_contestants import CONTESTANTS
from attention_timing import Problem, Worker, median

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.evaluation.plots import figure_grid, save_figure
from hf_sparse_attention.evaluation.report import format_number, format_table, run_record, write_json
from hf_sparse_attention.runs import replace_files

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class BenchmarkArguments:
    contestants: list[str] = field(
        default_factory=lambda: ["chunked", "dense_entmax15", "dense_entmax15_k", "sdpa"],
        metadata={"help": f"What to compare, the first with each other one. Known: {', '.join(CONTESTANTS)}."},
    )
    lengths: list[int] = field(default_factory=lambda: [8192], metadata={"help": "Sequence lengths."})
    batch: int = field(default=1, metadata={"help": "Batch size."})
    heads: int = field(default=8, metadata={"help": "Number of heads."})
    head_dim: int = field(default=64, metadata={"help": "Size of a head."})
    dtype: str = field(default="float32", metadata={"help": f"Of the inputs: {', '.join(DTYPES)}."})
    alpha: float = field(default=1.5, metadata={"help": "Exponent of entmax, in [1, 2]."})
    causal: bool = field(default=True, metadata={"help": "Queries see no later keys."})
    score_std: float = field(
        default=1.0, metadata={"help": "Standard deviation of the normal scores: larger is sparser."}
    )
    dense_heads: int = field(
        default=1,
        metadata={"help": "Dense contestants compute so many heads at a time (times are summed): all need too much."},
    )
    repeats: int = field(default=3, metadata={"help": "Turns of each contestant; medians are reported."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of each process; default: PyTorch's."})
    seed: int = field(default=0, metadata={"help": "Seed of the inputs."})
    output_dir: str = field(default="outputs/benchmark_attention_cpu", metadata={"help": "Folder for the results."})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}.")
        for name in ("batch", "heads", "head_dim", "dense_heads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1.")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths are {self.lengths}; allowed: at least 1 each.")
        if not 1.0 <= self.alpha <= 2.0:
            raise ValueError(f"alpha is {self.alpha}; allowed: 1 to 2.")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ValueError(f"contestants: {name!r} is not known; allowed: {', '.join(CONTESTANTS)}.")
            if CONTESTANTS[name].alphas and self.alpha not in CONTESTANTS[name].alphas:
                raise ValueError(f"contestants: {name!r} does not compute alpha = {self.alpha}.")
        self.threads = self.threads or torch.get_num_threads()


def main() -> None:
    (args,) = parse_arguments(BenchmarkArguments, description=__doc__)
    # Other jobs on the machine stretch wall times; who reads the results should know of them.
    load = os.getloadavg()[0]
    results = {}
    for length in args.lengths:
        try:
            results[str(length)] = compare(args, length)
        except RuntimeError as error:
            sys.exit(f"benchmark_attention_cpu.py: error: length {length}: {error}")
        print(f"\n{table(results[str(length)], length)}\n", flush=True)
    folder = Path(args.output_dir)
    settings = {**dataclasses.asdict(args), "legend": {name: CONTESTANTS[name].help for name in args.contestants}}
    record = run_record(settings, torch.device("cpu"), processes=1)
    record["machine"] = {
        "processor": processor(),
        "processors": os.cpu_count(),
        "cpu_threads": args.threads,
        "load_average_before": load,
    }

    def write(temporary: Path) -> None:
        write_json(temporary / "benchmark_attention_cpu.json", {"by_length": results, "run": record})
        tables = [table(result, length) for length, result in results.items()]
        (temporary / "benchmark_attention_cpu.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
        plot(temporary / "benchmark_attention_cpu.png", results)

    try:
        replace_files(folder, write)
    except OSError as error:
        sys.exit(f"benchmark_attention_cpu.py: error: {error}")
    print(f"Written: {', '.join(str(folder / f'benchmark_attention_cpu.{end}') for end in ('json', 'md', 'png'))}")


def compare(args: BenchmarkArguments, length: int) -> dict[str, dict[str, Any]]:
    """Medians of every contestant at one length."""
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(Problem) if f.name != "length"}
    workers = [Worker(name, Problem(length=length, **fields)) for name in args.contestants]
    measured: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    try:
        for _ in range(args.repeats):
            for worker in workers:
                measured[worker.name].append(worker.measure())
    finally:
        for worker in workers:
            worker.close()

    first = args.contestants[0]
    results: dict[str, dict[str, Any]] = {}
    for name, turns in measured.items():
        result = {key: median(turns, key) for key in ("forward_s", "backward_s", "cpu_s")}
        result["sum_s"] = result["forward_s"] + result["backward_s"]
        result["extra_mib"] = max(turn["extra_mib"] for turn in turns)
        result["heads_at_once"] = turns[0]["heads_at_once"]
        result["turns"] = [{key: turn[key] for key in ("forward_s", "backward_s", "cpu_s")} for turn in turns]
        results[name] = result
    for name, result in results.items():
        result["first_over_this"] = {
            key: results[first][key] / result[key] if result[key] > 0 else float("nan")
            for key in ("forward_s", "backward_s", "sum_s", "cpu_s", "extra_mib")
        }
        if CONTESTANTS[name].computes == CONTESTANTS[first].computes:
            difference = measured[name][0]["sample"] - measured[first][0]["sample"]
            result["largest_difference_from_first"] = float(np.abs(difference).max())
    return results


def table(results: dict[str, dict[str, Any]], length: int | str) -> str:
    """Times and memory; the last columns divide the first contestant by each."""
    first = next(iter(results))
    header = [
        f"length {length}", "computes", "forward s", "backward s", "sum s", "CPU s", "extra MiB", "heads at once",
        f"{first} / this: time", "memory",
    ]  # fmt: skip
    rows = [
        [
            name,
            CONTESTANTS[name].computes,
            *(format_number(result[key]) for key in ("forward_s", "backward_s", "sum_s", "cpu_s", "extra_mib")),
            str(result["heads_at_once"]),
            *(f"{result['first_over_this'][key]:.3f}" for key in ("sum_s", "extra_mib")),
        ]
        for name, result in results.items()
    ]
    return format_table(header, rows)


def plot(path: Path, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Time and memory against length, one line per contestant."""
    figure, ((left, right),) = figure_grid(1, 2, width=10.0, height=4.0)
    lengths = [int(length) for length in results]
    for number, name in enumerate(next(iter(results.values()))):
        style = {"color": f"C{number}", "marker": "o", "markersize": 4, "label": name}
        for axes, key in ((left, "sum_s"), (right, "extra_mib")):
            axes.plot(lengths, [result[name][key] for result in results.values()], **style)
    for axes, label in ((left, "forward + backward (s)"), (right, "extra memory at the peak (MiB)")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xlabel("length")
        axes.set_ylabel(label)
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
