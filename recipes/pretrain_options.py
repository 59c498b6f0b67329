"""Options of pretrain.py. Each can be a flag or a line of the YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_sparse_attention.arguments import ArgumentError, parse_mapping


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass
class ModelOptions:
    """Where the model comes from and which attention it has."""

    # What a continued run must be given again, beside the fields of the model's config.
    FIXED: ClassVar[tuple[str, ...]] = ("model_name_or_path", "tokenizer")

    model_config: str | None = field(
        default=None, metadata=_help("train from scratch: YAML or JSON file with the architecture")
    )
    model_overrides: dict | str | None = field(
        default=None,
        metadata=_help("fields to change in model_config, e.g. '{\"num_hidden_layers\": 2}'", metavar="JSON"),
    )
    model_name_or_path: str | None = field(
        default=None, metadata=_help("train on: a checkpoint (folder or Hub name), e.g. to patch its attention")
    )
    attn_implementation: str | None = field(
        default=None, metadata=_help("asentmax, entmax, ssmax, softmax, topk or one of transformers' own")
    )
    sparse_attention: dict | str | None = field(
        default=None, metadata=_help("fields of config.sparse_attention, e.g. '{\"alpha\": 1.5}'", metavar="JSON")
    )
    tokenizer: str | None = field(
        default=None, metadata=_help("folder or Hub name; default: the checkpoint's, or one trained on the data")
    )
    gradient_checkpointing: bool = field(default=False, metadata=_help("recompute activations in the backward pass"))
    alpha_start: float = field(default=1.0, metadata=_help("entmax exponent at step 0 when alpha_steps is above 0"))
    alpha_steps: int = field(
        default=0, metadata=_help("steps in which alpha moves from alpha_start to its value in sparse_attention")
    )

    def __post_init__(self) -> None:
        self.model_overrides = parse_mapping("model_overrides", self.model_overrides)
        self.sparse_attention = parse_mapping("sparse_attention", self.sparse_attention)
        if (self.model_config is None) == (self.model_name_or_path is None):
            raise ArgumentError("give exactly one of model_config and model_name_or_path")
        if self.model_overrides and self.model_config is None:
            raise ArgumentError("model_overrides changes model_config, which is not given")
        _check(1 <= self.alpha_start <= 2, "alpha_start", self.alpha_start, "1 to 2")
        _check(self.alpha_steps >= 0, "alpha_steps", self.alpha_steps, "at least 0")


@dataclass
class DataOptions:
    """Which text, and how it becomes rows."""

    train_data: list[str] | None = field(
        default=None, metadata=_help("files, folders, glob patterns, or one data set of the Hub")
    )
    subset: str | None = field(default=None, metadata=_help("configuration of a Hub data set"))
    split: str = field(default="train", metadata=_help("split of a Hub data set"))
    text_field: str = field(default="text", metadata=_help("field of a record that holds its text"))
    streaming: bool | None = field(
        default=None, metadata=_help("read on the fly in stored order; default: Hub yes, local files no")
    )
    length: int = field(default=1024, metadata=_help("tokens per training row"))
    cross_documents: bool = field(
        default=False, metadata=_help("let attention cross document boundaries within a row")
    )
    shuffle_tokens: int = field(default=1 << 22, metadata=_help("rows are shuffled within blocks of this many tokens"))
    validation_data: list[str] | None = field(
        default=None, metadata=_help("as train_data; without it nothing is validated")
    )
    validation_split: str = field(default="validation", metadata=_help("split of a Hub data set"))
    validation_rows: int = field(default=64, metadata=_help("rows of validation text, at most"))
    retrieval_fraction: float = field(
        default=0.0, metadata=_help("share of training rows that are needle-in-a-haystack tasks")
    )
    retrieval_text: str | None = field(
        default=None, metadata=_help("text file to hide needles in; default: the first training documents")
    )
    retrieval_tasks: list[str] | None = field(
        default=None, metadata=_help("needle tasks; default s_niah_1 and s_niah_2")
    )
    retrieval_questions: int = field(
        default=1,
        metadata=_help("needles of a retrieval row that are asked for at its end, if half of the row holds them"),
    )
    retrieval_weight: float = field(
        default=1.0,
        metadata=_help("how much an answer of a retrieval row counts in the loss, as a multiple of a token of text"),
    )
    retrieval_format: dict | str | None = field(
        default=None, metadata=_help("wording, number_digits, uuid_characters of the needles", metavar="JSON")
    )

    def __post_init__(self) -> None:
        self.retrieval_format = parse_mapping("retrieval_format", self.retrieval_format)
        if not self.train_data:
            raise ArgumentError("train_data: no text given")
        for name, least in (("length", 2), ("shuffle_tokens", 1), ("validation_rows", 1), ("retrieval_questions", 1)):
            _check(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        _check(0 <= self.retrieval_fraction < 1, "retrieval_fraction", self.retrieval_fraction, "0 to below 1")
        _check(0 < self.retrieval_weight < math.inf, "retrieval_weight", self.retrieval_weight, "above 0")
        if self.retrieval_weight != 1 and not self.retrieval_fraction:
            raise ArgumentError("retrieval_weight: there are no retrieval rows; give retrieval_fraction")


@dataclass
class RunOptions:
    """How to train, and what to write."""

    output_dir: str | None = field(
        default=None, metadata=_help("folder for the model, its tokenizer, checkpoints and metrics.jsonl")
    )
    max_steps: int = field(default=1000, metadata=_help("optimizer steps"))
    batch_size: int = field(default=64, metadata=_help("rows per optimizer step, over all processes and accumulation"))
    device_batch_size: int = field(
        default=8, metadata=_help("rows per forward pass of one process; the rest is accumulated")
    )
    learning_rate: float = field(default=1e-3, metadata=_help("peak learning rate"))
    final_learning_rate: float | None = field(
        default=None, metadata=_help("learning rate at the end; default: a tenth of the peak")
    )
    schedule: Literal["cosine", "wsd", "constant"] = field(
        default="cosine", metadata=_help("after warmup; wsd: constant, then linear decay")
    )
    warmup_steps: int = field(default=100, metadata=_help("steps of linear warmup"))
    decay_steps: int | None = field(
        default=None, metadata=_help("wsd: steps of the final decay; default: a fifth of max_steps")
    )
    scale_lr_multiplier: float = field(
        default=1.0, metadata=_help("learning rate of the length-scale parameters, as a multiple")
    )
    weight_decay: float = field(
        default=0.1, metadata=_help("AdamW weight decay; not on norms, biases and length scales")
    )
    adam_beta1: float = field(default=0.9, metadata=_help("AdamW: decay of the mean of the gradients"))
    adam_beta2: float = field(default=0.95, metadata=_help("AdamW: decay of the mean of their squares"))
    adam_epsilon: float = field(default=1e-8, metadata=_help("AdamW: added to the divisor"))
    max_grad_norm: float = field(default=1.0, metadata=_help("clip gradients to this norm; 0: no clipping"))
    mixed_precision: Literal["no", "bf16"] | None = field(
        default=None, metadata=_help("default: what accelerate is configured to")
    )
    seed: int = field(default=0, metadata=_help("initial weights, order of the data, dropout"))
    logging_steps: int = field(default=10, metadata=_help("steps between lines of metrics.jsonl"))
    eval_steps: int = field(default=0, metadata=_help("steps between validations; 0: only at the end"))
    save_steps: int = field(default=500, metadata=_help("steps between checkpoints; 0: only at the end"))
    keep_checkpoints: int = field(default=2, metadata=_help("newest checkpoints to keep"))
    resume: str | None = field(default=None, metadata=_help("latest (or nothing yet: start), or a checkpoint folder"))
    trackers: list[str] | None = field(default=None, metadata=_help("accelerate trackers, e.g. tensorboard wandb"))
    project: str = field(default="pretrain", metadata=_help("project name in the trackers"))
    push_to_hub: bool = field(default=False, metadata=_help("upload model, tokenizer and card when done"))
    hub_model_id: str | None = field(default=None, metadata=_help("name/repository to push to"))
    hub_private: bool = field(default=False, metadata=_help("make the repository private"))

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ArgumentError("output_dir: no folder given")
        at_least_one = ("max_steps", "batch_size", "device_batch_size", "logging_steps", "keep_checkpoints")
        not_negative = ("warmup_steps", "eval_steps", "save_steps", "seed", "weight_decay")
        not_negative += ("max_grad_norm", "scale_lr_multiplier")
        for name in at_least_one:
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in not_negative:
            _check(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 to below 1")
        for name in ("learning_rate", "adam_epsilon"):
            _check(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        if self.final_learning_rate is None:
            self.final_learning_rate = self.learning_rate / 10
        within = 0 <= self.final_learning_rate <= self.learning_rate
        _check(within, "final_learning_rate", self.final_learning_rate, "0 to learning_rate")
        if self.decay_steps is None:
            self.decay_steps = max(1, self.max_steps // 5)
        _check(1 <= self.decay_steps <= self.max_steps, "decay_steps", self.decay_steps, "1 to max_steps")
        if self.push_to_hub and not self.hub_model_id:
            raise ArgumentError("push_to_hub: hub_model_id is not given")

    def learning_rate_factor(self, step: int) -> float:
        """Learning rate of the update after ``step`` finished ones, as a share of the peak."""
        floor = self.final_learning_rate / self.learning_rate
        warm = (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "wsd":
            left = (self.max_steps - step) / self.decay_steps
            # The decay can begin within the warmup.
            return min(warm, floor + (1 - floor) * min(1.0, left))
        if step < self.warmup_steps:
            return warm
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _check(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ArgumentError(f"{name} is {value!r}; allowed: {allowed}")
