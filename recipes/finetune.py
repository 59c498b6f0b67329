r"""Give a checkpoint another attention and fine-tune it to that, with LoRA or in full.

    accelerate launch --config_file recipes/configs/accelerate/one_gpu.yaml recipes/finetune.py \
        recipes/configs/train/finetune_lora.yaml --output_dir outputs/my_model

Options, resuming and output are those of pretrain.py, plus the lora_* options. The top of output_dir is the merged
model, a checkpoint like any other; output_dir/adapter is the adapter, for hf_sparse_attention.load_adapter. Compare
before and after with perplexity.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from pretrain import run_and_exit
from pretrain_options import DataOptions, ModelOptions, RunOptions
from pretrain_results import save_model, unwrap
from pretrain_setup import build_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse_attention import load_adapter, lora_config, set_alpha
from hf_sparse_attention.arguments import ArgumentError, parse_arguments
from hf_sparse_attention.runs import replace_files
from hf_sparse_attention.training import get_alpha

ADAPTER = "adapter"


@dataclass
class FinetuneOptions(ModelOptions):
    """Which checkpoint is given which attention, and what of it is trained."""

    FIXED: ClassVar[tuple[str, ...]] = (*ModelOptions.FIXED, "lora_rank", "lora_alpha", "lora_targets", "lora_dora")

    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA matrices; 0: train all parameters"})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA scaling x rank; default: twice the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the LoRA matrices"})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "names of the adapted linear layers; default: all but the output layer"}
    )
    lora_dora: bool = field(default=False, metadata={"help": "DoRA: train the magnitudes of the weights too"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is None:
            raise ArgumentError("model_name_or_path: no checkpoint given; pretrain.py trains from scratch")
        if self.lora_rank < 0:
            raise ArgumentError(f"lora_rank is {self.lora_rank}; allowed: at least 0")
        if not 0 <= self.lora_dropout < 1:
            raise ArgumentError(f"lora_dropout is {self.lora_dropout}; allowed: 0 to below 1")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ArgumentError(f"lora_alpha is {self.lora_alpha}; allowed: above 0")


def main(argv: list[str] | None = None) -> None:
    options, *others = parse_arguments(
        FinetuneOptions, DataOptions, RunOptions, argv=argv, description=__doc__.splitlines()[0]
    )
    save_result = functools.partial(save_adapter, options) if options.lora_rank else save_model
    run_and_exit(Path(__file__).name, options, *others, make_model=adapted_model, save_result=save_result)


def adapted_model(
    options: FinetuneOptions, tokenizer: PreTrainedTokenizerBase, length: int
) -> PreTrainedModel | PeftModel:
    """The checkpoint under its new attention, with an untrained adapter around it."""
    model = build_model(options, tokenizer, length)
    if not options.lora_rank:
        return model
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in options.lora_targets or []:
        if target not in linear:
            raise ArgumentError(f"lora_targets: no layer is named {target!r}; there are {', '.join(sorted(linear))}")
    try:
        config = lora_config(
            model,
            r=options.lora_rank,
            lora_alpha=options.lora_alpha or 2 * options.lora_rank,
            lora_dropout=options.lora_dropout,
            target_modules=options.lora_targets or "all-linear",
            use_dora=options.lora_dora,
        )
        return get_peft_model(model, config)
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def save_adapter(
    options: FinetuneOptions,
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
) -> list[str]:
    """Write the adapter, then the checkpoint with the adapter as it was written merged into it."""
    trained, state_dict = unwrap(accelerator, model)
    if not accelerator.is_main_process:
        return []
    adapter = output / ADAPTER
    files = replace_files(adapter, lambda folder: trained.save_pretrained(folder, state_dict=state_dict))
    length = trained.config.max_position_embeddings
    base = build_model(options, tokenizer, length)
    # The schedule may be on its way still.
    set_alpha(base, get_alpha(trained))
    merged = load_adapter(base, adapter).merge_and_unload()

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return [*replace_files(output, write), *(f"{ADAPTER}/{name}" for name in files)]


if __name__ == "__main__":
    main()
