"""Which attention layers of transformers can be given sparse attention, and why others are refused."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

# Layers that take position_embeddings and pass every keyword on to the attention function; each has its tests.
SUPPORTED_ATTENTION = frozenset(
    {
        "LlamaAttention",
        "GPTNeoXAttention",
        "MistralAttention",
        "Qwen2Attention",
        "Qwen3Attention",
        "GemmaAttention",
        "Gemma2Attention",
        "Gemma3Attention",
        "Phi3Attention",
        "Olmo2Attention",
        "SmolLM3Attention",
        "GraniteAttention",
    }
)
SUPPORTED_MODELS = (
    "Llama, GPT-NeoX, Mistral, Qwen2, Qwen3, Gemma, Gemma2 without softcapping, Gemma3, Phi3, OLMo2, SmolLM3, Granite"
)


def is_supported(module: nn.Module) -> bool:
    """Whether ``module`` is an attention layer that sparse attention can be attached to."""
    return type(module).__name__ in SUPPORTED_ATTENTION


def check_config(config: PreTrainedConfig, preset: str) -> None:
    """Refuse model features that sparse attention would have to ignore.

    Raises:
        ValueError: naming the field of the config and what to do.
    """
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        raise ValueError(
            f"attn_implementation={preset!r} cannot cap attention scores (attn_logit_softcapping={cap}). Set "
            "config.attn_logit_softcapping = None to go without the cap, or use attn_implementation='eager'."
        )


def unsupported_model(name: str, preset: str) -> ValueError:
    """The error for a model none of whose layers is known."""
    return ValueError(
        f"{name} has no attention layer that attn_implementation={preset!r} can be attached to. Supported: "
        f"{SUPPORTED_MODELS}; and composite models whose text model is one of these. Attention sinks (gpt-oss), "
        "relative position biases (T5) and cross-attention are not supported: use another attn_implementation."
    )
