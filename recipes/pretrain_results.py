"""What pretrain.py writes when its loop is over: the model, its card, both to the Hub, and a summary."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard
from pretrain_options import DataOptions, ModelOptions, RunOptions
from transformers import PreTrainedTokenizerBase

import hf_sparse_attention
from hf_sparse_attention.checkpoints import CheckpointError
from hf_sparse_attention.data import is_local
from hf_sparse_attention.evaluation.report import format_number, format_table
from hf_sparse_attention.modelcard import Measurement, create_model_card
from hf_sparse_attention.runs import replace_files


def save_model(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, output: Path
) -> list[str]:
    """Write model and tokenizer to the output folder, each file whole or not at all; returns the file names."""
    plain, state_dict = unwrap(accelerator, model)
    if not accelerator.is_main_process:
        return []

    def write(folder: Path) -> None:
        plain.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)

    return replace_files(output, write)


def unwrap(accelerator: Accelerator, model: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model without what accelerate put around it or its parts, and its whole state, called in every process."""
    state = accelerator.get_state_dict(model)
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    # Parts that were compiled hold what they were made of under this name.
    return plain, {name.replace("_orig_mod.", ""): value for name, value in state.items()}


def model_card(
    script: str,
    config: transformers.PreTrainedConfig,
    parameters: int,
    evaluation: dict[str, float],
    tokens: int,
    model_options: ModelOptions,
    data_options: DataOptions,
    options: RunOptions,
) -> ModelCard:
    results = []
    if evaluation:
        name = ", ".join(Path(source).name for source in data_options.validation_data)
        described = f"{name}, rows of {data_options.length} tokens"
        results.append(Measurement("perplexity", evaluation["eval_perplexity"], described, f"recipes/{script}"))
    hub_data = [source for source in data_options.train_data if not is_local(source)]
    base = model_options.model_name_or_path
    return create_model_card(
        config,
        repo_id=options.hub_model_id or options.output_dir,
        parameters=parameters,
        training_length=data_options.length,
        results=results,
        datasets=hub_data,
        base_model=base if base and not is_local(base) else None,
        training={
            "data": [source if source in hub_data else Path(source).name for source in data_options.train_data],
            "retrieval rows": data_options.retrieval_fraction or None,
            "retrieval weight": data_options.retrieval_weight if data_options.retrieval_fraction else None,
            "tokens": tokens,
            "steps": options.max_steps,
            "rows per step": options.batch_size,
            "learning rate": options.learning_rate,
            "schedule": options.schedule,
            "warmup steps": options.warmup_steps,
            "weight decay": options.weight_decay,
            "seed": options.seed,
            "alpha steps": model_options.alpha_steps or None,
            "LoRA rank": getattr(model_options, "lora_rank", None) or None,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "hf_sparse_attention": hf_sparse_attention.__version__,
        },
    )


def summary_table(metrics: Path, steps: int, tokens: int, evaluation: dict[str, float]) -> str:
    """What came out, from the lines of ``metrics.jsonl``, if it is still there, and the last validation."""
    columns = {"steps": f"{steps:,}", "tokens": f"{tokens:,}"}
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    logged = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    if logged:
        columns["last training loss"] = f"{logged[-1]['loss']:.4f}"
        columns["tokens/s"] = f"{statistics.median(line['tokens_per_second'] for line in logged):,.0f}"
        columns["memory, GB"] = f"{max(line['memory_gb'] for line in logged):.2f}"
    if evaluation:
        columns["validation loss"] = f"{evaluation['eval_loss']:.4f}"
        columns["validation perplexity"] = format_number(evaluation["eval_perplexity"])
    return format_table(list(columns), [list(columns.values())])


def push(output: Path, files: list[str], options: RunOptions) -> None:
    """Upload the files in one commit."""
    api = HfApi()
    try:
        api.create_repo(options.hub_model_id, private=options.hub_private, exist_ok=True)
        api.upload_folder(
            repo_id=options.hub_model_id, folder_path=output, allow_patterns=files, commit_message="Trained model"
        )
    except Exception as error:  # connection errors have the types of the HTTP library
        raise CheckpointError(
            f"{options.hub_model_id}: could not be pushed ({error}); the model is in {output}"
        ) from error
