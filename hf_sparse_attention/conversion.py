"""Giving attention layers their length scale and hook, at construction or in place on a built model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .attention import prepare_attention_call
from .config import PRESETS, SparseAttentionConfig, merge_settings
from .length_scale import SCALE_MODULES, LengthScale
from .models import check_config, is_supported, unsupported_model

logger = logging.get_logger(__name__)

# Settings that layers keep when they are built; the others are read from the config at every call.
_BUILT_IN = ("length_scaling", "gamma_range", "positive_gamma", "alibi_layers")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config whose attention is replaced: the text model's in a composite model, else ``config`` itself."""
    text = config.get_text_config(decoder=True)
    # An encoder-decoder config answers with a rewritten copy of itself.
    return text if holds(config, text) else config


def holds(config: PreTrainedConfig | None, part: PreTrainedConfig) -> bool:
    """Whether ``part`` is ``config`` or a config within it, at any depth."""
    if config is None or config is part:
        return config is part
    return any(holds(getattr(config, key, None), part) for key in config.sub_configs)


def resolve_settings(config: PreTrainedConfig, preset: str) -> None:
    """Complete ``config.sparse_attention`` for ``preset`` and mark the config so that saving keeps the choice."""
    settings = SparseAttentionConfig.from_dict(merge_settings({"preset": preset}, config.sparse_attention))
    if settings.preset != preset:
        logger.warning(
            f"The config's sparse_attention was written for {settings.preset!r}; it now computes {preset!r}, as asked."
        )
        settings = settings.with_preset(preset)
    settings.check_sizes(config.num_attention_heads, config.num_hidden_layers)
    config.sparse_attention = settings.to_dict()
    # Serialised and honoured on load: without this package, loading stops instead of computing softmax.
    config.attn_implementation = preset


def attach(model: nn.Module, config: PreTrainedConfig) -> list[nn.Module]:
    """Add the length scale and the hook to every attention layer of ``model`` that belongs to ``config``.

    Returns:
        The layers that were changed; layers that have the hook already are left alone.
    """
    settings = SparseAttentionConfig.from_dict(config.sparse_attention)
    changed = []
    for module in model.modules():
        if not is_attachable(module, config) or is_attached(module):
            continue
        check_config(config, settings.preset)
        if settings.length_scaling != "none":
            like = next(module.parameters())
            with torch.device(like.device):
                scale = LengthScale(settings, config.hidden_size, config.num_attention_heads)
            module.length_scale = scale.to(like.dtype) if like.is_floating_point() else scale
        module.built_with = {name: getattr(settings, name) for name in _BUILT_IN}
        module.alibi_on_all_heads = settings.alibi_layers > 0 and module.layer_idx < settings.alibi_layers
        module.register_forward_pre_hook(prepare_attention_call, with_kwargs=True)
        changed.append(module)
    return changed


def detach(model: nn.Module) -> None:
    """Remove what :func:`attach` added.

    Raises:
        ValueError: PEFT has wrapped it; nothing is removed.
    """
    for module in model.modules():
        if is_attached(module) and _is_wrapped(module):
            raise ValueError(
                "an adapter holds the length scale. Call model.merge_and_unload() first; alpha alone can be changed "
                "with hf_sparse_attention.set_alpha."
            )
    for module in model.modules():
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook is prepare_attention_call:
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
                del module.alibi_on_all_heads, module.built_with
                if hasattr(module, "length_scale"):
                    del module.length_scale


def _is_wrapped(module: nn.Module) -> bool:
    """Whether PEFT has replaced the length scale of an attention layer, or a part of it, by a wrapper."""
    scale = getattr(module, "length_scale", None)
    parts = [] if scale is None else [type(scale), *map(type, scale.children())]
    return not {LengthScale, *SCALE_MODULES}.issuperset(parts)


def is_attachable(module: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether ``module`` is an attention layer of the model that ``config`` describes, and of a supported kind."""
    return is_supported(module) and getattr(module, "config", None) is config


def is_attached(module: nn.Module) -> bool:
    """Whether an attention layer has the hook."""
    return any(hook is prepare_attention_call for hook in module._forward_pre_hooks.values())


def convert(model: nn.Module, attn_implementation: str = "asentmax", **fields: Any) -> list[str]:
    """Give a built model sparse attention in place.

    Args:
        model: a transformers model of a supported family, or a PEFT wrapper around one.
        attn_implementation: one of the presets.
        **fields: fields of :class:`SparseAttentionConfig`, e.g. ``alpha=1.0, position_encoding="nape"``.

    Returns:
        Names of the parameters that are new, as in ``model.named_parameters()``.

    Raises:
        ValueError: a field is wrong, or no attention layer of the model is supported. The model is left unchanged.
    """
    if attn_implementation not in PRESETS:
        raise ValueError(f"attn_implementation is {attn_implementation!r}; allowed: {', '.join(PRESETS)}.")
    base = _pretrained(model)
    config = text_config(base.config)
    if not any(is_attachable(module, config) for module in base.modules()):
        raise unsupported_model(type(base).__name__, attn_implementation)
    check_config(config, attn_implementation)
    settings = SparseAttentionConfig.from_dict(
        merge_settings(config.sparse_attention, {"preset": attn_implementation, **fields})
    )
    settings.check_sizes(config.num_attention_heads, config.num_hidden_layers)
    _refuse_offloaded(base)
    before = {name for name, _ in model.named_parameters()}
    kept = {name: value for name, value in base.state_dict().items() if ".length_scale." in name}
    detach(base)
    config.sparse_attention = settings.to_dict()
    _set_implementation(base, config, attn_implementation)
    attach(base, config)
    base.load_state_dict({k: v for k, v in kept.items() if k in base.state_dict()}, strict=False)
    new = [name for name, _ in model.named_parameters() if name not in before]
    if new and (base is not model or getattr(base, "_hf_peft_config_loaded", False)):
        logger.warning(
            "The model has adapters already, which will not store the new length_scale parameters: save the whole "
            "model, or convert it before the adapter is made with hf_sparse_attention.lora_config."
        )
    return new


def revert(model: nn.Module, attn_implementation: str = "sdpa") -> None:
    """Undo :func:`convert`: remove the added parameters and hooks and go back to another attention implementation.

    Raises:
        ValueError: the model has no sparse attention, an adapter holds its length scale, or transformers does not know
            ``attn_implementation``. The model is left unchanged.
    """
    if attn_implementation in PRESETS:
        raise ValueError(f"revert goes back to transformers' own attention; use convert for {attn_implementation!r}.")
    base = _pretrained(model)
    config = text_config(base.config)
    if not any(is_attached(module) for module in base.modules()):
        raise ValueError(f"{type(base).__name__} has no sparse attention to remove.")
    attn_implementation = base.get_correct_attn_implementation(attn_implementation)
    detach(base)
    _set_implementation(base, config, attn_implementation)
    for owner in (config, base.config):
        for name in ("sparse_attention", "attn_implementation"):
            owner.__dict__.pop(name, None)


def _refuse_offloaded(model: nn.Module) -> None:
    """Accelerate brings the weights that it keeps elsewhere, and no parameter that is added later."""
    for module in model.modules():
        if is_supported(module) and next(module.parameters()).is_meta and _is_dispatched(module):
            raise ValueError(
                "weights of the model are offloaded, so it cannot be converted. Convert it without offloading, save "
                "it, and load that with the device_map."
            )


def _is_dispatched(module: nn.Module) -> bool:
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def _set_implementation(base: PreTrainedModel, config: PreTrainedConfig, name: str) -> None:
    config._attn_implementation_internal = name
    config.attn_implementation = name
    if base.config is not config:
        base.config._attn_implementation_internal = name
        base.config.attn_implementation = name


def _pretrained(model: nn.Module) -> PreTrainedModel:
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model or a PEFT wrapper around one, got {type(model).__name__}")
    return model
