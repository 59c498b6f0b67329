"""Train a small model on a synthetic task and measure it at up to 1024 times the training length.

    python recipes/synthetic.py recipes/configs/synthetic/mqmtar_short.yaml --output_dir outputs/mqmtar
    python recipes/synthetic.py recipes/configs/synthetic/tiny.yaml --attn_implementation softmax

The first argument may be a YAML file; flags override it; --help lists all options (synthetic_options.py). Rows are
drawn on the device; on CUDA the whole step is captured in graphs. Everything lands in output_dir: results.json
(measurements, curve, command, versions), metrics.jsonl, the model and its card. synthetic_suite.py runs many of these
side by side.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretrain_setup import check_same_model, model_fields
from synthetic_model import build_model
from synthetic_options import EvalOptions, TaskOptions, TrainOptions
from synthetic_report import describe_cell, synthetic_card
from synthetic_selection import Selection
from synthetic_training import NonFiniteLoss, Progress, Trainer, train
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from hf_sparse_attention.arguments import ArgumentError, parse_arguments
from hf_sparse_attention.checkpoints import (
    CheckpointError,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    locked_folder,
    read_state,
    remove_old,
    write_checkpoint,
)
from hf_sparse_attention.evaluation.report import run_record, write_json
from hf_sparse_attention.evaluation.synthetic import Cell, LadderOptions, run_ladder
from hf_sparse_attention.runs import StopSignals, drop_later_lines, replace_files
from hf_sparse_attention.training import get_alpha

STATE = "state.pt"
# Of Progress, in a checkpoint.
_PROGRESS = ("step", "seconds", "warm_seconds", "stage")


def main(argv: list[str] | None = None) -> None:
    parsed = parse_arguments(TaskOptions, TrainOptions, EvalOptions, argv=argv, description=__doc__.splitlines()[0])
    try:
        stopped_by = run(*parsed)
    except (ArgumentError, CheckpointError, NonFiniteLoss, OSError) as error:
        print(f"synthetic.py: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


def run(task_options: TaskOptions, options: TrainOptions, eval_options: EvalOptions) -> int | None:
    """Train and measure; returns the number of the signal that stopped the training, if any."""
    task = task_options.trained_task()
    low, high = options.lengths(task)
    tasks = options.all_stages(task_options.trained_tasks())
    try:
        task.check_length(low)
        for multiple in eval_options.multiples:
            task_options.evaluated_task().check_length(round(high * multiple))
    except ValueError as error:
        raise ArgumentError(f"train_lengths, multiples: {error}") from error
    output = Path(options.output_dir)
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    # Gradients of a task that is nearly solved are denormal numbers, with which a CPU takes several times as long.
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with locked_folder(output):
        if options.resume and read_status(output) == "finished":
            print(f"{output} holds a finished run: nothing to do")
            return None
        checkpoint = find_checkpoint(output, "latest") if options.resume else None
        if checkpoint is None and (output / "metrics.jsonl").exists():
            if not options.resume:
                raise CheckpointError(f"{output} holds a run already; use --resume latest or another output_dir")
            (output / "metrics.jsonl").unlink()
        set_seed(options.seed)
        model = build_model(task_options).to(device)
        trainer, progress = Trainer(model, tasks, options, device), Progress(options)
        selection = make_selection(task_options, options, eval_options)
        alpha = get_alpha(model)
        fields = {**model_fields(model, task_options), "validation": selection and selection.describe()}
        if checkpoint is not None:
            restore(checkpoint, trainer, selection, progress, fields, output)
        settings = {**vars(task_options), **vars(options), **vars(eval_options)}
        record = {
            "task": task_options.task,
            "attention": model.config.sparse_attention,
            "parameters": model.num_parameters(),
            "train_lengths": [low, high],
            "run": run_record(settings, device, 1),
        }
        return train_and_measure(
            trainer, selection, progress, alpha, fields, task_options, eval_options, record, output
        )


def train_and_measure(
    trainer: Trainer,
    selection: Selection | None,
    progress: Progress,
    alpha: float,
    fields: dict[str, Any],
    task_options: TaskOptions,
    eval_options: EvalOptions,
    record: dict[str, Any],
    output: Path,
) -> int | None:
    options, model = trainer.options, trainer.model
    began = time.monotonic()

    def save_state() -> Path:
        target = output / checkpoint_name(progress.step)
        write_checkpoint(
            target,
            lambda folder: torch.save(
                {**trainer.state_dict(), "selection": selection and selection.state_dict()}, folder / STATE
            ),
            {**{name: getattr(progress, name) for name in _PROGRESS}, "model": fields},
            is_main=True,
            wait=lambda: None,
        )
        remove_old(output, 1)
        return target

    def write(status: str, **more: Any) -> None:
        curve = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        training = {
            "steps": progress.step,
            "samples": progress.step * options.batch_size,
            "seconds": round(progress.seconds, 2),
            "compile_seconds": round(trainer.captured, 2),
            "wall_seconds": round(time.monotonic() - began, 2),
            "samples_per_second": round(progress.step * options.batch_size / max(progress.seconds, 1e-9), 1),
            "cuda_graph": trainer.graphed,
            "curve": thinned(curve),
        }
        if selection is not None:
            training["selection"] = {"length": selection.length, "kept_step": selection.step, **selection.curve}
        content = {"status": status, **record, "training": training, **more}
        replace_files(output, lambda folder: write_json(folder / "results.json", content))

    (output / "metrics.jsonl").touch()
    shown, before = -10.0, progress.step
    with StopSignals(None) as stop:
        try:
            for line in train(trainer, progress, output / "metrics.jsonl", stop, alpha):
                if line["seconds"] - shown >= 10:
                    shown = line["seconds"]
                    stage = f", stage {line['stage'] + 1}" if len(trainer.stages) > 1 else ""
                    print(
                        f"step {line['step']:,} ({line['seconds']:.0f} s, {line['samples']:,} samples): "
                        f"loss {line['loss']:.4f}, exact {line['exact_match']:.1%}, longest {line['longest']}{stage}",
                        flush=True,
                    )
                reached = math.isclose(get_alpha(model), alpha)
                if selection is not None and reached and crossed(before, line["step"], options.validation_steps):
                    exact, tokens = selection.look(trainer, line["step"])
                    print(f"{selection.length:,} tokens: exact {exact:.1%}, tokens {tokens:.2%}", flush=True)
                if options.save_steps and crossed(before, line["step"], options.save_steps):
                    save_state()
                before = line["step"]
        except NonFiniteLoss as error:
            write(f"stopped: {error}")
            hint = "try a lower learning_rate, more warmup_steps or a lower max_grad_norm"
            raise NonFiniteLoss(f"{error}; {hint}") from error
        if stop.number is not None:
            print(f"stopped by a signal; the state is in {save_state()}, --resume latest continues", flush=True)
            write(f"stopped: signal {stop.number}")
            return stop.number
    trainer.forget()
    if selection is not None and progress.step not in selection.curve["step"]:
        selection.look(trainer, progress.step)
    # An evaluation that is interrupted starts from here.
    save_state()
    if selection is not None:
        selection.apply(model)
    write("trained")
    if eval_options.save_model:
        # Measured as it is kept, so that the card's numbers are those of the saved weights.
        save_model(model, eval_options, output)
    results = evaluate(model, task_options, options, eval_options, lambda part: write("trained", evaluation=part))
    write("finished", evaluation=results)
    if eval_options.save_model:
        text = json.loads((output / "results.json").read_text(encoding="utf-8"))
        card = synthetic_card(model.config, text, output)
        replace_files(output, lambda folder: card.save(folder / "README.md"))
    for folder in list_checkpoints(output):
        shutil.rmtree(folder)
    return None


def crossed(before: int, step: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies after ``before``, up to ``step``."""
    return before // every < step // every


def make_selection(task_options: TaskOptions, options: TrainOptions, eval_options: EvalOptions) -> Selection | None:
    """Looks at a longer length during training, if asked for."""
    if not options.validation_multiple:
        return None
    task = task_options.validated_task()
    length = round(options.lengths(task)[1] * options.validation_multiple)
    ladder = LadderOptions(
        samples=options.validation_samples,
        full_length=length,
        batch_tokens=eval_options.batch_tokens,
        # The tests have the seeds eval_seed and, for what they generate, the next one.
        seed=eval_options.eval_seed + 2,
        dtype=autocast_dtype(options),
    )
    return Selection(task, length, ladder)


def autocast_dtype(options: TrainOptions) -> torch.dtype | None:
    return torch.bfloat16 if options.mixed_precision == "bf16" else None


def evaluate(
    model: PreTrainedModel,
    task_options: TaskOptions,
    options: TrainOptions,
    eval_options: EvalOptions,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Exact match at every length; ``keep`` is called with what there is after each."""
    task = task_options.evaluated_task()
    longest = options.lengths(task)[1]
    ladder = LadderOptions(
        samples=eval_options.samples,
        full_length=eval_options.full_length,
        min_samples=eval_options.min_samples,
        batch_tokens=eval_options.batch_tokens,
        generate=eval_options.generate,
        seconds=eval_options.eval_seconds,
        seed=eval_options.eval_seed,
        dtype=autocast_dtype(options),
    )
    protocol = {**dataclasses.asdict(ladder), "dtype": options.mixed_precision, "weights": eval_options.save_dtype}
    described = {"task": dataclasses.asdict(task), "protocol": protocol}
    if not eval_options.samples:
        return {**described, "cells": [], "not_measured": {}}
    cells: list[dict[str, Any]] = []

    def progress(cell: Cell) -> None:
        print(describe_cell(cell, longest), flush=True)
        cells.append(dataclasses.asdict(cell))
        keep({**described, "cells": cells, "not_measured": {}})

    lengths = [round(longest * multiple) for multiple in eval_options.multiples]
    return {**described, **run_ladder(model, task, lengths, ladder, progress)}


def save_model(model: PreTrainedModel, options: EvalOptions, output: Path) -> None:
    """Write weights and config. From now on the model computes with what was written, still in float32."""
    dtype = getattr(torch, options.save_dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    replace_files(output, lambda folder: model.save_pretrained(folder, state_dict=state))


def read_status(output: Path) -> str | None:
    """How far the run in a folder got, None if it has no results."""
    path = output / "results.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["status"] if path.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not what a run writes ({error!r}); remove it to go on") from error


def restore(
    checkpoint: Path,
    trainer: Trainer,
    selection: Selection | None,
    progress: Progress,
    fields: dict[str, Any],
    output: Path,
) -> None:
    state = read_state(checkpoint)
    check_same_model(fields, state.get("model", {}), checkpoint)
    if state["stage"] >= len(trainer.stages):
        raise ArgumentError(f"stages: there are {len(trainer.stages)}; {checkpoint} is in number {state['stage'] + 1}")
    tensors = torch.load(checkpoint / STATE, map_location=trainer.device, weights_only=True)
    trainer.load_state_dict(tensors)
    if selection is not None and tensors.get("selection") is not None:
        selection.load_state_dict(tensors["selection"])
    for name in _PROGRESS:
        setattr(progress, name, state[name])
    drop_later_lines(output / "metrics.jsonl", progress.step)
    print(f"continuing after step {progress.step} of {checkpoint}")


def thinned(curve: list[dict[str, float]], points: int = 300) -> dict[str, list[float]]:
    """At most ``points`` lines of the curve, the last among them, as columns."""
    stride = max(1, -(-len(curve) // points))
    kept = curve[::-1][::stride][::-1]
    names = ("step", "seconds", "loss", "exact_match", "grad_norm", "longest", "alpha", "stage")
    return {name: [float(f"{line[name]:.5g}") for line in kept] for name in names}


if __name__ == "__main__":
    main()
