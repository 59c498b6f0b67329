"""Loading the checkpoints of a comparison, with errors that name what does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import hf_sparse_attention  # noqa: F401  (registers the attention implementations)
from hf_sparse_attention import loading

ROPE_SCALINGS = ("none", "yarn", "dynamic")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings")
_PROBE = "The quick brown fox, aged 12, said: 'It is 5 o'clock.'\n\nNaïve?"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the checkpoint and what is wrong with it."""


@dataclass(frozen=True)
class CheckpointSpec:
    """One row of a comparison: a display name, where the model is, and how its RoPE is stretched."""

    name: str
    path: str
    rope_scaling: str = "none"

    @property
    def label(self) -> str:
        return self.name if self.rope_scaling == "none" else f"{self.name}+{self.rope_scaling}"


def parse_specs(models: Sequence[str], rope_scaling: Sequence[str] = ("none",)) -> list[CheckpointSpec]:
    """Specs from ``name=path`` or ``path`` strings and one RoPE scaling for all, or one per model.

    Raises:
        CheckpointError: no model, a name twice, an unknown scaling, or as many scalings as neither one nor the models.
    """
    if not models:
        raise CheckpointError("models: at least one checkpoint is needed, as name=path or path.")
    for kind in rope_scaling:
        if kind not in ROPE_SCALINGS:
            raise CheckpointError(f"rope_scaling is {kind!r}; allowed: {', '.join(ROPE_SCALINGS)}.")
    if len(rope_scaling) not in (1, len(models)):
        raise CheckpointError(
            f"rope_scaling has {len(rope_scaling)} values; give one, or one for each of {len(models)} models."
        )
    kinds = list(rope_scaling) * (len(models) if len(rope_scaling) == 1 else 1)
    specs = []
    for model, kind in zip(models, kinds, strict=True):
        name, _, path = model.rpartition("=")
        specs.append(CheckpointSpec(name or Path(path).name, path, kind))
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise CheckpointError(f"models: the name {label!r} occurs twice; give names as name=path.")
    return specs


def load_config(spec: CheckpointSpec) -> PreTrainedConfig:
    """The model config of a checkpoint folder or Hub name."""
    _check_folder(spec)
    try:
        return AutoConfig.from_pretrained(spec.path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"models: {spec.name}: the config of {spec.path} cannot be loaded: {error}") from error


def load_tokenizer(spec: CheckpointSpec, override: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a checkpoint, or ``override``."""
    if override is None:
        _check_folder(spec)
    path = override or spec.path
    try:
        return loading.load_tokenizer(path)
    except OSError as error:
        option = "tokenizer" if override else f"models: {spec.name}"
        raise CheckpointError(f"{option}: {error} (option tokenizer names another)") from error


def load_model(
    spec: CheckpointSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_length: int,
    max_length: int,
    rope_factor: float | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model in eval mode on ``device``.

    Args:
        train_length, max_length: context of the training and the longest one measured, for the RoPE scaling.
        rope_factor: default: ``max_length / train_length`` for yarn, 2 for dynamic.
        dtype: one of ``DTYPES``; auto is the checkpoint's own.

    Raises:
        CheckpointError: weights are missing, the vocabulary exceeds the model's, its RoPE cannot be scaled, or it has
            fewer learned positions than ``max_length``.
    """
    config = load_config(spec)
    if spec.rope_scaling != "none":
        _scale_rope(config, spec, train_length, max_length, rope_factor)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        with loading.naming_broken_files(spec.path):
            model, info = AutoModelForCausalLM.from_pretrained(
                spec.path, config=config, dtype=wanted, output_loading_info=True
            )
        loading.check_finite(model, spec.path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"models: {spec.name}: {spec.path} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(f"models: {spec.name}: {spec.path} lacks weights, which would be random: {missing}, ...")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise CheckpointError(
            f"models: {spec.name}: the tokenizer has token ids up to {largest}, the model has {rows} embeddings; "
            f"this tokenizer belongs to another model."
        )
    for name, module in model.named_modules():
        learned = isinstance(module, torch.nn.Embedding) and name.endswith(_POSITION_EMBEDDINGS)
        if learned and module.num_embeddings < max_length:
            raise CheckpointError(
                f"models: {spec.name} has learned positions up to {module.num_embeddings}, so it cannot read "
                f"{max_length} tokens; use shorter lengths."
            )
    return model.to(device).eval()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that have the same vocabulary and cut a probe text alike."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def training_length(specs: Sequence[CheckpointSpec]) -> int:
    """The smallest ``max_position_embeddings`` of the checkpoints, taken as the length they were trained at."""
    lengths = [getattr(load_config(spec).get_text_config(), "max_position_embeddings", None) for spec in specs]
    known = [length for length in lengths if length]
    if not known:
        raise CheckpointError("train_length: no checkpoint's config has max_position_embeddings; give the option.")
    return min(known)


def describe_model(model: PreTrainedModel) -> dict[str, object]:
    """What of a model belongs into a result file."""
    config = model.config.get_text_config()
    sparse = getattr(config, "sparse_attention", None)
    return {
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": config._attn_implementation,
        "sparse_attention": dict(sparse) if isinstance(sparse, dict) else None,
        "rope_parameters": getattr(config, "rope_parameters", None),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def reset_dynamic_rope(model: torch.nn.Module) -> None:
    """Forget the longest sequence seen: dynamic NTK keeps its frequencies, so results would depend on the order."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.register_buffer("inv_freq", module.original_inv_freq.to(module.inv_freq.device), persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len


def _check_folder(spec: CheckpointSpec) -> None:
    if not Path(spec.path).exists() and (spec.path.startswith((".", "/", "~")) or spec.path.count("/") != 1):
        raise CheckpointError(f"models: {spec.name}: no folder {spec.path!r}.")
    if Path(spec.path).exists() and not (Path(spec.path) / "config.json").is_file():
        raise CheckpointError(f"models: {spec.name}: {spec.path} has no config.json, so it is not a saved model.")


def _scale_rope(config, spec: CheckpointSpec, train_length: int, max_length: int, factor: float | None) -> None:
    text = config.get_text_config()
    sparse = getattr(text, "sparse_attention", None) or {}
    encoding = sparse.get("position_encoding", "model")
    rope = getattr(text, "rope_parameters", None)
    if encoding != "model" or not rope:
        kind = encoding if encoding != "model" else "no rotary"
        raise CheckpointError(f"rope_scaling: {spec.name} has {kind} positions, there is no RoPE to scale; use none.")
    if "rope_type" not in rope:
        raise CheckpointError(
            f"rope_scaling: {spec.name} has one RoPE per layer type, which this option does not scale."
        )
    if rope["rope_type"] != "default":
        raise CheckpointError(
            f"rope_scaling: the RoPE of {spec.name} is already scaled ({rope['rope_type']}); use none."
        )
    if factor is None:
        factor = max(1.0, max_length / train_length) if spec.rope_scaling == "yarn" else 2.0
    if factor < 1:
        raise CheckpointError(f"rope_factor is {factor}; allowed: at least 1.")
    scaled = {**rope, "rope_type": spec.rope_scaling, "factor": float(factor)}
    if spec.rope_scaling == "yarn":
        scaled["original_max_position_embeddings"] = train_length
        text.max_position_embeddings = round(train_length * factor)
    else:
        # Dynamic NTK starts to stretch where the sequence exceeds max_position_embeddings.
        text.max_position_embeddings = train_length
    text.rope_parameters = scaled
