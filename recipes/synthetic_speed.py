"""How fast synthetic.py trains: samples per second with captured, eager and compiled steps, and the same losses.

    python recipes/synthetic_speed.py
    python recipes/synthetic_speed.py --configs recipes/configs/synthetic/mqmtar_short.yaml --batch_sizes 512 --compile

Also measures one batch at the longest length, with the untrained model. Prints tables and writes speed.json.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from synthetic_model import build_model
from synthetic_options import EvalOptions, TaskOptions, TrainOptions
from synthetic_training import Trainer
from transformers import set_seed

from hf_sparse_attention.arguments import ArgumentError, parse, parse_arguments
from hf_sparse_attention.evaluation.report import format_table, run_record, write_json
from hf_sparse_attention.evaluation.synthetic import LadderOptions, measure

CONFIGS = Path(__file__).parent / "configs" / "synthetic"


@dataclass
class SpeedOptions:
    configs: list[str] = field(
        default_factory=lambda: [
            str(CONFIGS / f"{task}_short.yaml") for task in ("mqmtar", "reverse", "sort", "copy")
        ],
        metadata={"help": "YAML files of synthetic.py."},
    )
    presets: list[str] = field(
        default_factory=lambda: ["asentmax", "softmax"], metadata={"help": "Kinds of attention to time."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [128, 512], metadata={"help": "Rows per step."})
    steps: int = field(default=50, metadata={"help": "Steps that are timed."})
    compile: bool = field(default=False, metadata={"help": "On a GPU: time compiled steps too."})
    evaluate_length: int = field(default=65536, metadata={"help": "Source of the evaluation; 0: none."})
    output: str = field(default="outputs/synthetic_speed/speed.json", metadata={"help": "Results file."})

    def __post_init__(self) -> None:
        for name, values in (("steps", [self.steps]), ("batch_sizes", self.batch_sizes)):
            if min(values) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        if self.evaluate_length < 0:
            raise ArgumentError(f"evaluate_length is {self.evaluate_length}; allowed: at least 0")


def main(argv: list[str] | None = None) -> None:
    (options,) = parse_arguments(SpeedOptions, argv=argv, description=__doc__.splitlines()[0])
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = [{"cuda_graph": False}]
    kinds += [{"cuda_graph": True}] if device.type == "cuda" else []
    kinds += [{"cuda_graph": True, "compile": True}] if options.compile and device.type == "cuda" else []
    rows: list[dict[str, Any]] = []
    try:
        for config in options.configs:
            for preset in options.presets:
                for batch in options.batch_sizes:
                    rows += [time_steps(config, preset, batch, kind, options, device) for kind in kinds]
        evaluations = [evaluate(options, preset, device) for preset in options.presets if options.evaluate_length]
    except ArgumentError as error:
        sys.exit(f"synthetic_speed.py: error: {error}")
    header = list(rows[0])
    print("\n" + format_table(header, [[str(row[name]) for name in header] for row in rows]))
    record = run_record(dataclasses.asdict(options), device, 1)
    try:
        write_json(Path(options.output), {"training": rows, "evaluation": evaluations, "run": record})
    except OSError as error:
        sys.exit(f"synthetic_speed.py: error: {options.output}: could not be written ({error})")


def read_options(config: str, preset: str, **changes: Any) -> tuple[TaskOptions, TrainOptions]:
    flags = [f"--{name}={value}" for name, value in changes.items()]
    argv = [config, "--output_dir", "unused", "--attn_implementation", preset, *flags]
    return parse(TaskOptions, TrainOptions, EvalOptions, argv=argv)[:2]


def time_steps(
    config: str, preset: str, batch: int, kind: dict[str, bool], options: SpeedOptions, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of a step at the longest training rows, and the mean loss of the first and of the timed steps."""
    task_options, train_options = read_options(config, preset, batch_size=batch, **kind)
    set_seed(0)
    task = task_options.trained_task()
    low, high = train_options.lengths(task)
    trainer = Trainer(build_model(task_options).to(device).train(), task, train_options, device)
    trainer.set_lengths(low, high)
    trainer.set_rate(0.1)
    began = time.monotonic()
    warm = 0
    while warm < 10:
        warm += trainer.steps(high)
    first_loss = trainer.read()[0] / warm
    first_seconds = time.monotonic() - began
    began = time.monotonic()
    for _ in range(options.steps):
        trainer.steps(high)
    loss = trainer.read()[0] / options.steps
    seconds = (time.monotonic() - began) / options.steps
    row = {
        "task": task.name,
        "preset": preset,
        "batch": batch,
        "step": "compiled" if kind.get("compile") else "captured" if trainer.graphed else "eager",
        "ms": round(1e3 * seconds, 2),
        "samples/s": round(batch / seconds),
        "first 10 steps, s": round(first_seconds, 1),
        "their loss": round(first_loss, 4),
        "loss": round(loss, 4),
        "GB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else 0,
    }
    print(row, flush=True)
    trainer.forget()
    if device.type == "cuda":
        del trainer
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row


def evaluate(options: SpeedOptions, preset: str, device: torch.device) -> dict[str, Any]:
    """Seconds of one batch at the longest length, the second time."""
    task_options, _ = read_options(options.configs[0], preset)
    model = build_model(task_options).to(device).eval()
    task = task_options.evaluated_task()
    ladder = LadderOptions(samples=4, min_samples=4, generate=2, dtype=torch.bfloat16)
    for length in (
        min(64, options.evaluate_length),
        min(1024, options.evaluate_length),
        *[options.evaluate_length] * 2,
    ):
        cell = measure(model, task, length, ladder)
        print(f"evaluation of {preset} at {length}: {cell}", flush=True)
    return {"preset": preset, **dataclasses.asdict(cell)}


if __name__ == "__main__":
    main()
