"""What pretrain.py needs before its loop: tokenizer, model, rows of text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from pretrain_options import DataOptions, ModelOptions
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse_attention.arguments import ArgumentError, load_yaml
from hf_sparse_attention.data import (
    MixedRows,
    PackedRows,
    iterate_texts,
    load_documents,
    tokenize_documents,
    train_tokenizer,
)
from hf_sparse_attention.evaluation.needle_tasks import NeedleFormat
from hf_sparse_attention.evaluation.needle_training import make_training_rows
from hf_sparse_attention.loading import check_finite, load_tokenizer, naming_broken_files

# Fields of a config that do not change what the model computes.
_FREE_FIELDS = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "sparse_attention.backend",
    "transformers_version",
    "use_cache",
)


def make_tokenizer(documents: Any, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The given tokenizer, that of the checkpoint, or one trained on the data."""
    source = options.tokenizer or options.model_name_or_path
    if source is not None:
        return load_tokenizer(source)
    vocab_size = read_model_config(options).vocab_size
    try:
        return train_tokenizer(iterate_texts(documents), vocab_size)
    except ValueError as error:
        raise ArgumentError(f"{options.model_config}: {error}") from error


def read_model_config(options: ModelOptions) -> transformers.PreTrainedConfig:
    """The architecture from its file, every field checked against the config class."""
    path = options.model_config
    values = {**load_yaml(path), **(options.model_overrides or {})}
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise ArgumentError(f"{path}: model_type is {model_type!r}, which transformers does not know")
    known = set(AutoConfig.for_model(model_type).to_dict())
    for name in values:
        if name not in known:
            raise ArgumentError(f"{path}: {model_type} has no field {name!r}")
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # the validation of transformers has its own error types
        raise ArgumentError(f"{path}: {' '.join(str(error).split())}") from error


def build_model(options: ModelOptions, tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedModel:
    """A new model whose config says that it was trained at ``length``, or a checkpoint; weights in fp32."""
    attention = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    try:
        if options.model_name_or_path is not None:
            if options.sparse_attention is not None:
                attention["sparse_attention"] = options.sparse_attention
            with naming_broken_files(options.model_name_or_path):
                model, info = AutoModelForCausalLM.from_pretrained(
                    options.model_name_or_path,
                    dtype=torch.float32,
                    use_safetensors=True,
                    output_loading_info=True,
                    **attention,
                )
            missing = sorted(name for name in info["missing_keys"] if ".length_scale." not in name)
            if missing:
                raise OSError(f"{options.model_name_or_path} lacks weights, which would be random: {missing[0]}, ...")
            check_finite(model, options.model_name_or_path)
        else:
            config = read_model_config(options)
            config.max_position_embeddings = length
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(config, name, getattr(tokenizer, name))
            if options.sparse_attention is not None:
                config.sparse_attention = options.sparse_attention
            model = AutoModelForCausalLM.from_config(config, **attention)
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error)) from error
    if options.alpha_steps and getattr(model.config, "sparse_attention", None) is None:
        raise ArgumentError("alpha_steps: the model has no sparse attention; give attn_implementation")
    vocab_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab_size:
        raise ArgumentError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size of {vocab_size}"
        )
    if options.gradient_checkpointing:
        # Older versions of transformers have only the second name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def model_fields(model: torch.nn.Module, options: Any) -> dict[str, Any]:
    """What a run keeps when it is continued: the fields of the model's config, and the options in ``options.FIXED``.

    Returns:
        JSON values by name, those of ``sparse_attention`` as ``sparse_attention.alpha`` and so on.
    """
    fields = model.config.to_dict()
    settings = fields.pop("sparse_attention", None) or {}
    fields |= {f"sparse_attention.{name}": value for name, value in settings.items()}
    fields["attn_implementation"] = model.config._attn_implementation
    for name in options.FIXED:
        value = getattr(options, name)
        is_folder = isinstance(value, str) and Path(value).is_dir()
        fields[name] = str(Path(value).resolve()) if is_folder else value
    kept = {name: value for name, value in fields.items() if name not in _FREE_FIELDS}
    return json.loads(json.dumps(kept, default=str))


def check_same_model(fields: Mapping[str, Any], saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to continue another model than the one that the checkpoint holds.

    Raises:
        ArgumentError: naming the fields and options that differ.
    """
    # A field in only one of them is one that another version of transformers does not have.
    differing = [
        f"{name} is {fields[name]!r}, not {saved[name]!r}"
        for name in sorted(fields.keys() & saved.keys())
        if fields[name] != saved[name]
    ]
    if differing:
        raise ArgumentError(f"{', '.join(differing)} as in {checkpoint}: a run goes on as it began")


def training_rows(
    documents: Any, tokenizer: PreTrainedTokenizerBase, options: DataOptions, seed: int
) -> PackedRows | MixedRows:
    """Rows of packed text, with retrieval rows among them if asked for."""
    rows = PackedRows(
        # A stream is tokenized as it is read.
        tokenize_documents(documents, tokenizer) if isinstance(documents, datasets.Dataset) else documents,
        tokenizer,
        options.length,
        seed=seed,
        cross_documents=options.cross_documents,
        block_tokens=options.shuffle_tokens,
    )
    if not options.retrieval_fraction:
        return rows
    source = documents if options.retrieval_text is None else load_documents(options.retrieval_text)
    texts = (text[:200_000] for text in iterate_texts(source) if text.strip())
    haystack = "\n".join(itertools.islice(texts, 10))
    try:
        format = NeedleFormat(**(options.retrieval_format or {}))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"retrieval_format: {error}") from error
    settings = {"length": options.length, "format": format, "seed": seed, "bos": tokenizer.bos_token_id is not None}
    settings["questions"] = options.retrieval_questions
    if options.retrieval_tasks:
        settings["tasks"] = options.retrieval_tasks

    def extra(start: int) -> Iterator[dict[str, list[int]]]:
        return make_training_rows(tokenizer, haystack, start=start, **settings)

    try:
        next(extra(0))
    except ValueError as error:
        raise ArgumentError(f"retrieval rows: {error}") from error
    return MixedRows(rows, extra, options.retrieval_fraction, options.retrieval_weight)


def validation_rows(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> list[dict[str, torch.Tensor]]:
    """The same rows at every validation, drawn from all over the validation text."""
    if not options.validation_data:
        return []
    documents = load_documents(
        options.validation_data,
        text_field=options.text_field,
        split=options.validation_split,
        subset=options.subset,
        streaming=options.streaming,
    )
    rows = PackedRows(documents, tokenizer, options.length, cross_documents=options.cross_documents, epochs=1)
    return list(itertools.islice(rows, options.validation_rows))
