"""Run synthetic.py for many tasks, variants and seeds, side by side and over all GPUs, and compare them.

    python recipes/synthetic_suite.py recipes/configs/synthetic/suite.yaml
    python recipes/synthetic_suite.py recipes/configs/synthetic/suite.yaml --only 'mqmtar/asentmax_*' --seeds 0 1 2

Run number k goes to GPU number k mod count. Runs are in output_dir/TASK/VARIANT/seedN, with logs beside them: finished
ones are left alone when the suite is started again, interrupted ones go on. Writes synthetic.json, synthetic.md with
tables in the paper's form, and synthetic.png.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from synthetic import read_status
from synthetic_options import EvalOptions, TaskOptions, TrainOptions
from synthetic_report import write_report

from hf_sparse_attention.arguments import ArgumentError, parse, parse_arguments, parse_mapping
from hf_sparse_attention.checkpoints import CheckpointError
from hf_sparse_attention.runs import leaving_on_signals

# Relative, so that the commands in the results work in any checkout.
SCRIPT = os.path.relpath(Path(__file__).with_name("synthetic.py"))


@dataclass
class SuiteOptions:
    tasks: dict | str | None = field(
        default=None, metadata={"help": "name: YAML file of synthetic.py, for each task", "metavar": "JSON"}
    )
    variants: dict | str | None = field(
        default=None, metadata={"help": "name: options of synthetic.py, for each kind of attention", "metavar": "JSON"}
    )
    options: dict | str | None = field(
        default=None, metadata={"help": "options of synthetic.py for all runs", "metavar": "JSON"}
    )
    overrides: dict | str | None = field(
        default=None,
        metadata={"help": "pattern of TASK/VARIANT/seedN: options for these runs; later ones win", "metavar": "JSON"},
    )
    devices: dict | str | None = field(
        default=None,
        metadata={
            "help": "pattern: number of the GPU for these runs (mod count); others take turns",
            "metavar": "JSON",
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "A run for each."})
    only: list[str] = field(default_factory=lambda: ["*"], metadata={"help": "Patterns of the runs to do."})
    output_dir: str = field(default="outputs/synthetic", metadata={"help": "Folder for runs, tables and picture."})
    runs_per_device: int = field(default=1, metadata={"help": "Runs at the same time on a GPU, or on the CPU."})
    total_seconds: float | None = field(
        default=None, metadata={"help": "Stop what is still running after so long (it is saved) and compare the rest."}
    )
    poll_seconds: float = field(default=15.0, metadata={"help": "Seconds between two lines of progress."})
    report_only: bool = field(default=False, metadata={"help": "Only compare what is there."})

    def __post_init__(self) -> None:
        for name in ("tasks", "variants", "options", "overrides", "devices"):
            setattr(self, name, parse_mapping(name, getattr(self, name)) or {})
        if not self.report_only and not (self.tasks and self.variants and self.seeds):
            raise ArgumentError("give tasks, variants and seeds")
        if self.runs_per_device < 1:
            raise ArgumentError(f"runs_per_device is {self.runs_per_device}; allowed: at least 1")


@dataclass
class Run:
    """One call of synthetic.py; ``options`` are on top of those of the task's file."""

    name: str
    config: str
    options: dict[str, Any]
    device: int | None = None
    process: subprocess.Popen | None = None

    def command(self) -> list[str]:
        return [SCRIPT, self.config, *as_flags(self.options)]


def main(argv: list[str] | None = None) -> None:
    (options,) = parse_arguments(SuiteOptions, argv=argv, description=__doc__.splitlines()[0])
    output = Path(options.output_dir)
    try:
        with leaving_on_signals("synthetic_suite.py"):
            failed = [] if options.report_only else run_all(list_runs(options), output, options)
        if options.report_only and not any(output.glob("**/results.json")):
            raise ArgumentError(f"output_dir: {output} holds no results.json of a run")
        table = write_report(output)
    except (ArgumentError, CheckpointError, OSError) as error:
        sys.exit(f"synthetic_suite.py: error: {error}")
    print(f"\n{table}\n\nWritten: synthetic.json, synthetic.md and synthetic.png in {output}")
    if failed:
        sys.exit("synthetic_suite.py: failed: " + ", ".join(failed))


def list_runs(options: SuiteOptions) -> list[Run]:
    """All runs that were asked for, with options that synthetic.py accepts."""
    runs = []
    for seed in options.seeds:
        for task, config in options.tasks.items():
            for variant, fields in options.variants.items():
                name = f"{task}/{variant}/seed{seed}"
                if not any(fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern) for pattern in options.only):
                    continue
                merged = merge({}, options.options)
                merged = merge(merged, fields)
                for pattern, more in options.overrides.items():
                    if fnmatch.fnmatchcase(name, pattern):
                        merged = merge(merged, more)
                merged |= {"seed": seed, "output_dir": str(Path(options.output_dir) / name), "resume": "latest"}
                runs.append(Run(name, config, merged))
                try:
                    parse(TaskOptions, TrainOptions, EvalOptions, argv=runs[-1].command()[1:])
                except ArgumentError as error:
                    raise ArgumentError(f"{name}: {error}") from error
    if not runs:
        raise ArgumentError(f"only: no run has a name like {' or '.join(options.only)}")
    return runs


def merge(options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``more`` on top of ``options``; mappings such as sparse_attention field by field."""
    merged = dict(options)
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def as_flags(options: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def run_all(runs: list[Run], output: Path, options: SuiteOptions) -> list[str]:
    """Run everything; returns the names of the runs that failed."""
    began = shown = time.monotonic()
    devices = visible_devices()
    queues: list[deque[Run]] = [deque() for _ in devices]
    waiting = [run for run in runs if read_status(Path(run.options["output_dir"])) != "finished"]
    for number, run in enumerate(waiting):
        pinned = [place for pattern, place in options.devices.items() if fnmatch.fnmatchcase(run.name, pattern)]
        place = (pinned[-1] if pinned else number) % len(devices)
        run.device = devices[place]
        queues[place].append(run)
    slots = min(len(waiting), options.runs_per_device * len(devices))
    threads = str(max(1, (os.cpu_count() or 1) // max(1, slots)))
    running: list[Run] = []
    failed: list[str] = []
    print(f"{len(waiting)} of {len(runs)} runs to do, on {len(devices)} device(s), {slots} at a time", flush=True)
    try:
        while running or any(queues):
            for device, queue in zip(devices, queues):
                while queue and sum(run.device == device for run in running) < options.runs_per_device:
                    running.append(start(queue.popleft(), output, threads))
            time.sleep(0.2)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                ended = "finished" if run.process.returncode == 0 else f"failed: {last_line(output, run)}"
                print(f"{time.monotonic() - began:6.0f} s  {run.name}: {ended}", flush=True)
                if run.process.returncode != 0:
                    failed.append(run.name)
            if options.total_seconds is not None and time.monotonic() - began > options.total_seconds:
                print(f"{options.total_seconds:.0f} s are over: stopping {len(running)} runs", flush=True)
                failed += [run.name for queue in queues for run in queue] + [run.name for run in running]
                break
            if time.monotonic() - shown >= options.poll_seconds:
                shown = time.monotonic()
                for run in running:
                    print(f"{shown - began:6.0f} s  {run.name}: {last_line(output, run)}", flush=True)
    finally:
        stop([run.process for run in running])
    return failed


def visible_devices() -> list[int | str | None]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them, or [None] for the CPU."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or list(range(count)))[:count] or [None]


def start(run: Run, output: Path, threads: str) -> Run:
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    if run.device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(run.device)
    log = log_file(output, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"python {shlex.join(run.command())}\n")
        file.flush()
        run.process = subprocess.Popen(
            [sys.executable, *run.command()], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    return run


def stop(processes: list[subprocess.Popen], patience: float = 20.0) -> None:
    """Ask the processes to save and end; kill those that do not."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def log_file(output: Path, run: Run) -> Path:
    return output / f"{run.name}.log"


def last_line(output: Path, run: Run) -> str:
    lines = log_file(output, run).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:150]


if __name__ == "__main__":
    main()
