"""Tiny models of every supported family, and the comparisons that all of them must pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import hf_sparse_attention  # noqa: F401 - registers the presets

VOCAB = 61
# What models call a cache of keys and values: the first from transformers 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2}
_LOCAL_AND_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED),
    "gpt_neox": (GPTNeoXConfig, {}),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": 5}),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 20}),
    "gemma": (GemmaConfig, {**_GROUPED, "head_dim": 20}),
    "gemma2": (Gemma2Config, {**_GROUPED, **_LOCAL_AND_GLOBAL, "head_dim": 20, "attn_logit_softcapping": None}),
    "gemma3": (Gemma3TextConfig, {**_GROUPED, **_LOCAL_AND_GLOBAL, "head_dim": 20}),
    "phi3": (Phi3Config, _GROUPED),
    "olmo2": (Olmo2Config, _GROUPED),
    "smollm3": (SmolLM3Config, {**_GROUPED, "no_rope_layers": [1, 0]}),
    "granite": (GraniteConfig, _GROUPED),
}


def tiny_config(family: str = "llama", **kwargs: Any) -> PreTrainedConfig:
    """The config of a tiny model; keywords override its fields."""
    config_class, fields = FAMILIES[family]
    return config_class(**{**_SIZES, **fields, **kwargs})


def tiny_model(
    family: str = "llama", preset: str = "asentmax", position: str | dict[str, Any] = "model", **kwargs: Any
) -> PreTrainedModel:
    """A tiny model in evaluation mode whose length scale differs between heads, layers and tokens.

    ``position``: the position encoding, or fields of ``sparse_attention``.
    """
    fields = {"position_encoding": position} if isinstance(position, str) else position
    config = tiny_config(family, attn_implementation=preset, sparse_attention=fields, **kwargs)
    model = AutoModelForCausalLM.from_config(config)
    randomize_scale(model)
    return model.eval()


def randomize_scale(model: nn.Module) -> None:
    """Scale parameters start at values that make t nearly constant; tests need it to depend on everything."""
    for name, parameter in model.named_parameters():
        if ".length_scale." in name:
            nn.init.normal_(parameter, mean=0.5, std=0.3)


def prompts(*lengths: int) -> list[Tensor]:
    """Random prompts, one (length,) tensor each, free of the padding token."""
    return [torch.randint(2, VOCAB, (length,)) for length in lengths]


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """Logits (length, vocabulary) of one prompt by itself."""
    return model(prompt[None].to(model.device), use_cache=False).logits[0]


def padded(prompts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """A batch of prompts and its attention mask."""
    length = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        where = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, where] = prompt
        mask[row, where] = 1
    return ids, mask


def packed(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One row that holds all prompts, and position ids that restart for each."""
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    return torch.cat(prompts)[None], positions[None]


def assert_same(actual: Tensor, expected: Tensor, case: str) -> None:
    """fp32 logits agree to 1e-4."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4, msg=lambda text: f"{case}: {text}")
