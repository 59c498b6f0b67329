"""From nothing to a comparison in minutes on a CPU: train two mini Llamas on the bundled text and measure both.

    python recipes/quickstart.py

One has softmax attention and RoPE, the other ASEntmax and NAPE; all else is equal. Both are then measured at lengths
up to eight times the training length: perplexity, and needles in a haystack. Runs pretrain.py, perplexity.py and
needle.py as anyone would, two at a time; the commands are printed. An interrupted run continues when started again.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.evaluation.report import format_number, format_table
from hf_sparse_attention.runs import leaving_on_signals

ROOT = Path(__file__).resolve().parents[1]
TRAIN_CONFIG = "recipes/configs/train/quickstart.yaml"
MODELS = {
    "softmax_rope": ["--attn_implementation", "sdpa"],
    "asentmax_nape": ["--attn_implementation", "asentmax", "--sparse_attention", '{"position_encoding": "nape"}'],
}
NEEDLE_FORMAT = ["--wording", "short", "--number_digits", "4", "--uuid_characters", "8"]


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Folder for models, tables and pictures."})
    max_steps: int | None = field(
        default=None, metadata={"help": f"Training steps; default: those of {TRAIN_CONFIG}."}
    )
    samples: int = field(default=10, metadata={"help": "Needle samples per task, length and depth."})
    windows_per_document: int = field(default=8, metadata={"help": "Windows per document for the perplexity."})
    poll_seconds: float = field(default=15.0, metadata={"help": "Seconds between two lines of progress."})

    def __post_init__(self) -> None:
        # Looked at only after the training by the recipes that have them.
        for name in ("max_steps", "samples", "windows_per_document"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: at least 1")


def main() -> None:
    (args,) = parse_arguments(QuickstartArguments, description=__doc__.splitlines()[0])
    try:
        with leaving_on_signals("quickstart.py"):
            compare(args)
    except OSError as error:
        sys.exit(f"quickstart.py: error: {error}")


def compare(args: QuickstartArguments) -> None:
    began = time.monotonic()
    output = Path(args.output_dir).resolve()
    os.chdir(ROOT)
    if output.is_relative_to(ROOT):
        # The commands that are shown and stored in the results then work in any checkout.
        output = output.relative_to(ROOT)
    output.mkdir(parents=True, exist_ok=True)
    steps = [] if args.max_steps is None else ["--max_steps", str(args.max_steps)]

    print("Training (real text, half of the rows with a needle to find)")
    train = ["recipes/pretrain.py", TRAIN_CONFIG, *steps, "--resume", "latest"]
    run_together(
        {name: [*train, *flags, "--output_dir", str(output / name)] for name, flags in MODELS.items()}, output, args
    )
    trained = time.monotonic()

    print("Measuring at 1x, 2x, 4x and 8x of the training length")
    rope, nape = (f"{name}={output / name}" for name in MODELS)
    # RoPE also stretched by YaRN, without further training: the usual remedy for longer contexts.
    models = ["--models", rope, rope, nape, "--rope_scaling", "none", "yarn", "none"]
    # Rows of training text start anywhere in a document, so windows have no BOS either.
    perplexity = ["recipes/perplexity.py", "recipes/configs/eval/perplexity.yaml", *models, "--bos", "no"]
    perplexity += ["--windows_per_document", str(args.windows_per_document)]
    needle = ["recipes/needle.py", "recipes/configs/eval/needle_small.yaml", *models, *NEEDLE_FORMAT]
    needle += ["--samples", str(args.samples), "--cache_dir", str(output / "needle_samples")]
    run_together(
        {
            "perplexity": [*perplexity, "--output_dir", str(output / "perplexity")],
            "needle": [*needle, "--output_dir", str(output / "needle")],
        },
        output,
        args,
    )
    summary = summarize(output)
    (output / "summary.md").write_text(summary + "\n", encoding="utf-8")
    done = time.monotonic()
    print(f"\n{summary}\n\nTrained in {trained - began:.0f} s, measured in {done - trained:.0f} s.")
    print("Tables and pictures:")
    for file in ("summary.md", "perplexity/perplexity.png", "needle/needle.png", "perplexity/perplexity.json"):
        print(f"  {output / file}")


def run_together(commands: dict[str, list[str]], output: Path, args: QuickstartArguments) -> None:
    """Run the commands side by side, each on its share of the cores; stop them all when one fails."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Small matrices use one core better than several: two processes of one thread beat one of two.
    threads = str(max(1, cores // len(commands)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    running: dict[str, subprocess.Popen] = {}
    try:
        for name, command in commands.items():
            print(f"  python {shlex.join(command)}", flush=True)
            with (output / f"{name}.log").open("w", encoding="utf-8") as log:
                running[name] = subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
        wait(running, output, args.poll_seconds)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def wait(running: dict[str, subprocess.Popen], output: Path, poll_seconds: float) -> None:
    began = shown = time.monotonic()
    while any(process.poll() is None for process in running.values()):
        time.sleep(0.5)
        for name, process in running.items():
            if process.poll():
                log = output / f"{name}.log"
                sys.exit(f"{name} failed; the end of {log}:\n{log.read_text(encoding='utf-8')[-3000:]}")
        if time.monotonic() - shown >= poll_seconds:
            shown = time.monotonic()
            progress = " | ".join(f"{name}: {last_line(output, name)}" for name in running)
            print(f"  {shown - began:4.0f} s  {progress}", flush=True)


def last_line(output: Path, name: str) -> str:
    """Where a run is: the newest step and loss of a training, else the end of its progress bar."""
    metrics = output / name / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    # A run that was killed may have cut its last one.
    if lines and lines[-1].endswith("}"):
        latest = json.loads(lines[-1])
        return ", ".join(f"{key} {format_number(latest[key])}" for key in ("step", "loss") if key in latest)
    text = (output / f"{name}.log").read_text(encoding="utf-8").replace("\r", "\n").strip()
    return text.splitlines()[-1][:70] if text else "starting"


def summarize(output: Path) -> str:
    """Both results in one table, read from the JSON files of the recipes."""
    perplexity = json.loads((output / "perplexity" / "perplexity.json").read_text(encoding="utf-8"))
    needle = json.loads((output / "needle" / "needle.json").read_text(encoding="utf-8"))
    lengths, base = perplexity["protocol"]["lengths"], perplexity["protocol"]["train_length"]
    header = ["", *(f"{length} ({length / base:g}x)" for length in lengths)]
    rows = []
    for name, result in perplexity["checkpoints"].items():
        rows.append(
            [f"perplexity {name}", *(format_number(result["by_length"][str(n)]["perplexity"]) for n in lengths)]
        )
    for task in needle["protocol"]["tasks"]:
        for name, result in needle["checkpoints"].items():
            recall = result["recall_by_length"][task]
            rows.append([f"{task} {name}", *(f"{recall[str(n)]:.0%}" for n in lengths)])
    samples = needle["protocol"]["samples_per_cell"] * len(needle["protocol"]["depths"])
    unigram = format_number(perplexity["unigram_perplexity"])
    return (
        f"{format_table(header, rows)}\n\nTrained at {base} tokens. Perplexity: same target tokens at every length "
        f"(unigram model: {unigram}). Needles: share found of {samples} samples."
    )


if __name__ == "__main__":
    main()
