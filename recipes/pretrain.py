r"""Train a causal language model from scratch, or go on with a checkpoint under another attention.

    accelerate launch --config_file recipes/configs/accelerate/one_gpu.yaml recipes/pretrain.py \
        recipes/configs/train/asentmax.yaml --output_dir outputs/my_model

The first argument may be a YAML file; flags override it; --help lists all options (pretrain_options.py). The same
command with --resume latest continues after any interruption, with the same losses. Everything lands in output_dir:
the model, tokenizer and card at its top, checkpoint-* folders, metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pretrain_losses import evaluate, forward_backward
from pretrain_options import DataOptions, ModelOptions, RunOptions
from pretrain_results import model_card, push, save_model, summary_table
from pretrain_setup import (
    build_model,
    check_same_model,
    make_tokenizer,
    model_fields,
    training_rows,
    validation_rows,
)
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

import hf_sparse_attention
from hf_sparse_attention.arguments import ArgumentError, parse_arguments
from hf_sparse_attention.checkpoints import (
    CheckpointError,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    locked_folder,
    read_state,
    remove_old,
    set_aside_later,
    write_checkpoint,
)
from hf_sparse_attention.data import (
    DataError,
    load_documents,
    step_rows,
)
from hf_sparse_attention.loading import load_tokenizer
from hf_sparse_attention.runs import MetricsLog, StopSignals, make_accelerator, replace_files

MakeModel = Callable[[ModelOptions, PreTrainedTokenizerBase, int], torch.nn.Module]
SaveResult = Callable[[Accelerator, torch.nn.Module, PreTrainedTokenizerBase, Path], list[str]]


class NonFiniteLoss(RuntimeError):
    """Training cannot go on: loss or gradients are NaN or infinite."""


def main(argv: list[str] | None = None) -> None:
    parsed = parse_arguments(ModelOptions, DataOptions, RunOptions, argv=argv, description=__doc__.splitlines()[0])
    run_and_exit(Path(__file__).name, *parsed, make_model=build_model, save_result=save_model)


def run_and_exit(script: str, *options: Any, **steps: Any) -> None:
    """:func:`run` with errors as one line on stderr and exit codes of a program."""
    try:
        stopped_by = run(script, *options, **steps)
    except (ArgumentError, CheckpointError, DataError, NonFiniteLoss, OSError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


def run(
    script: str,
    model_options: ModelOptions,
    data_options: DataOptions,
    options: RunOptions,
    *,
    make_model: MakeModel,
    save_result: SaveResult,
) -> int | None:
    """Train to the end or to a signal, whose number is returned.

    Args:
        script: name of the recipe, for the model card.
        make_model: model to train from the model options, the tokenizer and the length of the rows.
        save_result: writes the trained model and the tokenizer to a folder, called in every process; answers with the
            names of the files.
    """
    output = Path(options.output_dir)
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    for tracker in options.trackers or []:
        if tracker not in installed:
            raise ArgumentError(f"trackers: {tracker!r} is not installed; installed: {', '.join(installed) or 'none'}")
    accelerator = make_accelerator(
        mixed_precision=options.mixed_precision, log_with=options.trackers, project_dir=options.output_dir
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ArgumentError(
            f"FSDP is configured, but accelerate runs {accelerator.distributed_type.value} on {accelerator.device}; "
            "use multi_gpu.yaml or cpu.yaml here"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ArgumentError(f"mixed_precision is {accelerator.mixed_precision!r}; allowed: no, bf16")
    per_pass = options.device_batch_size * accelerator.num_processes
    if options.batch_size % per_pass:
        raise ArgumentError(
            f"batch_size is {options.batch_size}; allowed: multiples of device_batch_size x processes, {per_pass}"
        )
    if options.push_to_hub:
        try:
            validate_repo_id(options.hub_model_id)
        except HFValidationError as error:
            raise ArgumentError(f"hub_model_id: {error}") from error
    with locked_folder(output) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        checkpoint = starting_point(output, options.resume)
        accelerator.wait_for_everyone()
        return train(accelerator, checkpoint, script, model_options, data_options, options, make_model, save_result)


def starting_point(output: Path, resume: str | None) -> Path | None:
    if resume is not None:
        return find_checkpoint(output, resume)
    used = [path.name for path in (*list_checkpoints(output), output / "metrics.jsonl") if path.exists()]
    if used:
        raise CheckpointError(f"{output} holds a run already ({used[0]}); use --resume latest or another output_dir")
    return None


def train(
    accelerator: Accelerator,
    checkpoint: Path | None,
    script: str,
    model_options: ModelOptions,
    data_options: DataOptions,
    options: RunOptions,
    make_model: MakeModel,
    save_result: SaveResult,
) -> int | None:
    output = Path(options.output_dir)
    set_seed(options.seed)
    with accelerator.main_process_first():
        documents = load_documents(
            data_options.train_data,
            text_field=data_options.text_field,
            split=data_options.split,
            subset=data_options.subset,
            streaming=data_options.streaming,
        )
        # What the main process saved is what the others, and a continued run, use.
        if not accelerator.is_main_process or (checkpoint is not None and (output / "tokenizer_config.json").exists()):
            tokenizer = load_tokenizer(output)
        else:
            # A checkpoint lies in the folder of its run, which may be another.
            source = checkpoint and checkpoint.parent
            tokenizer = load_tokenizer(source) if source else make_tokenizer(documents, model_options)
            replace_files(output, tokenizer.save_pretrained)
        validation = validation_rows(tokenizer, data_options)
        rows = training_rows(documents, tokenizer, data_options, options.seed)
    model = make_model(model_options, tokenizer, data_options.length)
    parameters, fields = model.num_parameters(), model_fields(model, model_options)

    groups = hf_sparse_attention.parameter_groups(
        model, options.weight_decay, options.learning_rate, options.scale_lr_multiplier
    )
    group_settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    adam = {"betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon}
    # The fused optimizer can be told on the device to leave everything as it is, so that the host need not wait for
    # each loss. Divided parameters do not have that.
    fused = accelerator.distributed_type != DistributedType.FSDP
    optimizer = torch.optim.AdamW(groups, **adam, fused=fused)
    plain_model = model
    model, optimizer = accelerator.prepare(model, optimizer)
    alpha_schedule = None
    if model_options.alpha_steps:
        alpha_schedule = hf_sparse_attention.AlphaSchedule(
            plain_model, None, model_options.alpha_steps, model_options.alpha_start
        )

    step, tokens, evaluation, pending = 0, 0, {}, []
    if checkpoint is not None:
        state = read_state(checkpoint)
        rows.load_state_dict(state["data"])
        check_same_model(fields, state["model"], checkpoint)
        if state["step"] > options.max_steps:
            raise ArgumentError(f"max_steps is {options.max_steps}; {checkpoint} is after step {state['step']}")
        restore(accelerator, checkpoint, optimizer, state["step"])
        step, tokens, evaluation = state["step"], state["tokens"], state["evaluation"]
        pending = state["pending_losses"]
        for group, own in zip(optimizer.param_groups, group_settings, strict=True):
            group.update(own, **adam)
        accelerator.print(f"continuing after step {step} of {checkpoint}")
        if accelerator.is_main_process:
            for path in set_aside_later(output, step):
                accelerator.print(f"a later checkpoint is not part of this run any more: it is now {path}")
    elif options.resume is not None:
        accelerator.print(f"{output} holds no checkpoint yet: starting at step 0")
    log = MetricsLog(accelerator, output / "metrics.jsonl", step, pending)
    settings = {**vars(model_options), **vars(data_options), **vars(options)}
    if accelerator.is_main_process:
        replace_files(output, lambda folder: (folder / "options.json").write_text(json.dumps(settings, indent=1)))
    if options.trackers:
        accelerator.init_trackers(options.project, {name: str(value) for name, value in settings.items()})

    def save(name: str, progress: dict[str, Any]) -> None:
        write_checkpoint(
            output / name,
            lambda folder: accelerator.save_state(str(folder)),
            {**progress, "evaluation": evaluation, "pending_losses": log.pending, "model": fields},
            is_main=accelerator.is_main_process,
            wait=accelerator.wait_for_everyone,
        )

    # Steps whose loss and gradient norm are still on the device, each with the progress before it.
    unread: list[tuple[dict[str, Any], torch.Tensor]] = []
    stopped = torch.zeros((), device=accelerator.device)
    if fused:
        optimizer.optimizer.found_inf = stopped
    step_tokens = options.batch_size * data_options.length

    def read_losses(began: float) -> float:
        """Wait for the steps since the last call, note their losses and return the last gradient norm."""
        norm = math.nan
        values = torch.stack([value for _, value in unread]).tolist()
        seconds = (time.perf_counter() - began) / len(unread)
        for (before, _), (loss, norm) in zip(unread, values):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                number = before["step"] + 1
                name = f"nonfinite-{number:08d}"
                save(name, before)
                raise NonFiniteLoss(
                    f"step {number}: loss {loss}, gradient norm {norm}; the state before it is in {output / name}"
                )
            log.add(loss, step_tokens, seconds)
        unread.clear()
        bar.set_postfix_str(log.summary(), refresh=False)
        return norm

    model.train()
    progress = {"step": step, "tokens": tokens, "data": rows.state_dict()}
    steps = step_rows(
        rows,
        options.batch_size,
        options.device_batch_size,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    bar = tqdm(total=options.max_steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    with StopSignals(accelerator) as signals, contextlib.closing(steps), bar:
        while step < options.max_steps:
            if not unread:
                began = time.perf_counter()
            factor = options.learning_rate_factor(step)
            for group, own in zip(optimizer.param_groups, group_settings, strict=True):
                group["lr"] = own["lr"] * factor
            alpha = alpha_schedule.step(step) if alpha_schedule else None

            rows_now = next(steps)
            loss = forward_backward(accelerator, model, rows_now.batches, rows_now.labels)
            norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or math.inf)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            values = torch.stack([loss, norm])
            unread.append((progress, values))
            # Once a value is not finite, no later step changes anything until the host has noticed.
            torch.maximum(stopped, (~values.isfinite().all()).float(), out=stopped)
            if not fused:
                norm = read_losses(began)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            tokens += step_tokens
            progress = {"step": step, "tokens": tokens, "data": rows_now.position}

            bar.update()
            last = step == options.max_steps
            logging = step % options.logging_steps == 0 or last
            evaluating = validation and (last or (options.eval_steps and step % options.eval_steps == 0))
            stopping = signals.received()
            saving = last or stopping or (options.save_steps and step % options.save_steps == 0)
            if unread and (logging or evaluating or saving):
                norm = read_losses(began)
            if logging:
                rate = options.learning_rate * factor
                log.write(step, learning_rate=rate, grad_norm=norm, tokens=tokens, alpha=alpha)
            if evaluating:
                if alpha_schedule:
                    # What a model that is saved now computes with.
                    alpha_schedule.step(step)
                evaluation = evaluate(accelerator, model, validation, options.device_batch_size)
                log.append(step, evaluation)
            if saving:
                save(checkpoint_name(step), progress)
                if accelerator.is_main_process:
                    remove_old(output, options.keep_checkpoints)
            if stopping and not last:
                accelerator.print(f"stopped by a signal after step {step}; --resume latest continues")
                accelerator.end_training()
                return signals.number

    if alpha_schedule:
        alpha_schedule.step(step)
    files = save_result(accelerator, model, tokenizer, output)
    if accelerator.is_main_process:
        card = model_card(
            script, plain_model.config, parameters, evaluation, tokens, model_options, data_options, options
        )
        replace_files(output, lambda folder: card.save(folder / "README.md"))
        if options.push_to_hub:
            push(output, [*files, "README.md"], options)
        table = summary_table(output / "metrics.jsonl", step, tokens, evaluation)
        print(f"{table}\n\nWritten to {output}", flush=True)
    accelerator.end_training()
    return None


def restore(accelerator: Accelerator, checkpoint: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Load weights, optimizer and random states, and see that the optimizer really has them."""
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # torch and accelerate have many types
        raise CheckpointError(f"{checkpoint}: could not be restored ({error})") from error
    updates = max((int(values["step"]) for values in optimizer.state.values()), default=0)
    if updates != step:
        raise CheckpointError(
            f"{checkpoint}: accelerate {accelerate.__version__} restored an optimizer of {updates} steps instead of "
            f"{step}; FSDP2 needs accelerate 1.13 or newer for this"
        )


if __name__ == "__main__":
    main()
