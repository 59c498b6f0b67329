"""The attention function that transformers calls for every preset, and the hook that feeds it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from .config import PRESETS, SparseAttentionConfig
from .length_scale import query_scale, warn_frozen
from .masks import check_key_boundaries, has_packed_documents, is_own, memoised, visibility
from .ops import sparse_attention
from .positions import alibi_slopes

_LENGTH_SCALE = "sparse_length_scale"
_PACKED_CACHE = "_sparse_attention_packed"

# Keywords that models pass along to the attention function and that change nothing it computes.
_IRRELEVANT = frozenset(
    {
        "attention_mask",
        "cache_position",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)


def prepare_attention_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a patched attention layer: adds the length scale and removes RoPE where asked.

    A module-level function, so that deepcopy, pickle and torch.export work; it acts only while the model's current
    attention implementation is one of the presets.
    """
    if module.config._attn_implementation not in PRESETS:
        return None
    settings = module.config.sparse_attention
    _check_unchanged(module, settings)
    hidden_states = args[0] if args else kwargs["hidden_states"]
    kwargs = dict(kwargs)
    scale = getattr(module, "length_scale", None)
    kwargs[_LENGTH_SCALE] = () if scale is None else scale(hidden_states)
    if module.training and scale is not None and hidden_states.requires_grad and not torch.compiler.is_compiling():
        warn_frozen(scale)
    if settings["position_encoding"] != "model":
        kwargs["position_embeddings"] = _without_rotation(module, kwargs.get("position_embeddings"))
    _refuse_packed_cache(module, hidden_states, kwargs)
    return args, kwargs


def _check_unchanged(module: nn.Module, settings: dict[str, Any] | None) -> None:
    """Refuse settings whose change a built layer would not follow."""
    for name, value in module.built_with.items():
        if settings is None or settings.get(name) != value:
            raise ValueError(
                f"The model was built with sparse_attention.{name} {value!r}, which its config no longer says. Change "
                f"settings with hf_sparse_attention.convert(model, {module.config._attn_implementation!r}, ...)."
            )


def _without_rotation(module: nn.Module, embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if embeddings is None:
        raise ValueError(
            f"{type(module).__name__} was called without the keyword position_embeddings; pass it by keyword, so that "
            "its rotation can be removed."
        )
    cos, sin = embeddings
    return memoised((cos, sin), lambda: (torch.ones_like(cos), torch.zeros_like(sin)), "identity")


def _refuse_packed_cache(module: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any]) -> None:
    """Stop before tokens are added to a cache that holds packed documents: its boundaries are not kept."""
    if torch.compiler.is_compiling() or module.layer_idx != 0:
        return
    # By its type: what layers call it differs between models and releases.
    cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
    if cache is None:
        return
    mask = kwargs.get("attention_mask")
    is_packed = getattr(cache, _PACKED_CACHE, False) and cache.get_seq_length() > 0
    if is_packed and not is_own(mask):
        raise ValueError(
            "The cache was filled from a row of packed documents, whose boundaries a cache does not keep: further "
            "tokens would see every document. Give each document its own row to generate, or pass use_cache=False."
        )
    if hidden_states.shape[1] > 1:
        boundaries = map(kwargs.get, ("position_ids", "cu_seq_lens_q", "seq_idx"))
        setattr(cache, _PACKED_CACHE, is_packed or has_packed_documents(mask, hidden_states, *boundaries))


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Sparse attention under the calling convention of ``transformers.AttentionInterface``.

    Args:
        module: the attention layer; ``module.config.sparse_attention`` holds the settings.
        query, key, value: (B, heads, Q, D), (B, key heads, K, D), (B, key heads, K, D_v), floating point.
        attention_mask: None, bool (B, 1, Q, K) with True = visible, or float with 0 = visible.
        position_ids: (B or 1, Q); restarts mark packed documents.
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1,), boundaries of one flattened row, from 0 to its length.

    Returns:
        The output (B, Q, heads, D_v), contiguous, and the weights (B, heads, Q, K) if ``output_attentions`` or None.

    Raises:
        ValueError: the layer was not given sparse attention, a keyword or mask is not supported, boundaries do not
            cover the row or differ, or the sequence is divided between processes.
    """
    settings = _settings(module)
    coefficients = kwargs.pop(_LENGTH_SCALE, None)
    if coefficients is None:
        raise ValueError(
            f"{type(module).__name__} was built without sparse attention, so attn_implementation="
            f"{settings.preset!r} cannot be switched on afterwards. Call hf_sparse_attention.convert(model, "
            f"{settings.preset!r}), or load the model with attn_implementation={settings.preset!r}."
        )
    _check_keywords(kwargs, settings.preset)
    _refuse_context_parallel(settings.preset)
    check_key_boundaries(cu_seq_lens_q, cu_seq_lens_k)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    num_queries = query.shape[2]
    # Traced code takes the slice without asking for lengths; elsewhere it takes as long as a launch, for nothing.
    may_be_longer = torch.compiler.is_compiling() or key.shape[2] > num_queries
    if attention_mask is None and causal and num_queries > 1 and may_be_longer:
        # The prefill of a static cache: the rest of its slots are empty, and queries are aligned to the first keys.
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    visible = visibility(
        attention_mask,
        query,
        key.shape[2],
        is_causal=causal,
        sliding_window=sliding_window,
        position_ids=position_ids,
        cu_seqlens=cu_seq_lens_q,
        seq_idx=seq_idx,
    )
    slopes = _slopes(module, settings, query, visible.visible_keys)
    scale = None
    if coefficients:
        scale = query_scale(settings, *coefficients, visible.visible_keys).expand(query.shape[:3])
        if slopes is not None and not settings.scale_alibi_heads:
            scale = scale.masked_fill(memoised((slopes,), lambda: slopes[:, None] > 0), 1.0)
    query, key, value = _same_dtype(query, key, value)
    result = sparse_attention(
        query,
        key,
        value,
        alpha=settings.alpha,
        scaling=scaling,
        query_scale=scale,
        slopes=slopes,
        attention_mask=visible.attention_mask,
        key_start=visible.key_start,
        key_end=visible.key_end,
        query_positions=visible.query_positions if slopes is not None else None,
        key_positions=visible.key_positions if slopes is not None else None,
        top_k=settings.top_k,
        dropout_p=dropout,
        return_weights=bool(output_attentions),
        impl=settings.backend,
    )
    output, weights = result if output_attentions else (result, None)
    return output.transpose(1, 2).contiguous(), weights


def _settings(module: nn.Module) -> SparseAttentionConfig:
    """The layer's settings, checked against the attention implementation in force."""
    preset = module.config._attn_implementation
    stored = module.config.sparse_attention
    if stored is None:
        return SparseAttentionConfig(preset=preset)
    # The dict stays the one place that says what is computed; parsing it costs more than a decode step should.
    if torch.compiler.is_compiling() or any(isinstance(value, (list, dict)) for value in stored.values()):
        settings = SparseAttentionConfig(**stored)
    else:
        settings = _parse(tuple(stored.items()))
    if settings.preset != preset:
        raise ValueError(
            f"The model was built with attn_implementation={settings.preset!r} and is now set to {preset!r}. Call "
            f"hf_sparse_attention.convert(model, {preset!r}) to change it."
        )
    return settings


@functools.lru_cache(maxsize=64)
def _parse(items: tuple[tuple[str, Any], ...]) -> SparseAttentionConfig:
    return SparseAttentionConfig.from_dict(dict(items))


def _check_keywords(kwargs: dict[str, Any], preset: str) -> None:
    for name, value in kwargs.items():
        if value is not None and name not in _IRRELEVANT:
            raise ValueError(
                f"attn_implementation={preset!r} does not support the keyword {name!r} that the model passes to its "
                "attention; use attn_implementation='eager' for this model or do not pass it."
            )


def _refuse_context_parallel(preset: str) -> None:
    """torch's context parallelism replaces SDPA; other attention would see only the keys of its own process."""
    if _is_context_parallel():
        raise ValueError(
            f"attn_implementation={preset!r} cannot be computed under context parallelism, which divides sequences "
            "for torch's own SDPA only. Use FSDP2 with activation checkpointing, or tensor parallelism."
        )


@torch.compiler.assume_constant_result
def _is_context_parallel() -> bool:
    owner = getattr(F.scaled_dot_product_attention, "__globals__", {}).get("__name__", "")
    return owner.startswith("torch.distributed.tensor.experimental")


def _slopes(module: nn.Module, settings: SparseAttentionConfig, query: Tensor, keeper: Tensor) -> Tensor | None:
    """Slopes of the query heads that this process holds, (heads,); None without ALiBi. Kept on ``keeper``."""
    num_heads, held = module.config.num_attention_heads, query.shape[1]
    # Not layer_idx: compiled code is made anew for every number that it reads, and torch stops doing so after eight.
    all_heads = module.alibi_on_all_heads
    alibi_heads = settings.num_alibi_heads(num_heads, all_heads)
    if not alibi_heads:
        return None

    def of_held_heads() -> Tensor:
        slopes = alibi_slopes(settings, num_heads, query.device, all_heads)
        return slopes if held == num_heads else slopes.split(held)[_tensor_parallel_rank(module)]

    return memoised((keeper,), of_held_heads, ("slopes", settings.alibi_slopes, alibi_heads, num_heads, held))


def _tensor_parallel_rank(module: nn.Module) -> int:
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            return parameter.device_mesh.get_local_rank()
    for part in module.children():
        # Where transformers keeps it when it shards into plain tensors (5.4).
        if (mesh := getattr(part, "_hf_device_mesh", None)) is not None:
            return mesh.get_local_rank()
    raise ValueError(
        f"{type(module).__name__} holds only some of its heads, and it is not known which: those have ALiBi slopes. "
        "Shard the model with transformers' tensor parallelism."
    )


def _same_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation leaves queries and keys in float32 under autocast; attention runs in autocast's dtype, as SDPA does."""
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)
