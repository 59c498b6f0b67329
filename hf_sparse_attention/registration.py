"""Registers the presets with transformers and teaches model construction, loading and saving about them.

Eight methods and a function of transformers are wrapped, each once and each acting only on configs that ask for a
preset: ``PreTrainedConfig.from_dict`` and ``to_json_file``, ``PreTrainedModel._from_config``,
``get_correct_attn_implementation``, ``set_attn_implementation``, ``post_init`` and ``_initialize_weights``,
``GenerationMixin.init_continuous_batching``, and ``masking_utils._preprocess_mask_arguments``.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.generation import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import CONFIG_NAME, logging

from .attention import sparse_attention_forward
from .config import PRESETS, SparseAttentionConfig, for_preset, merge_settings
from .conversion import attach, holds, is_attachable, is_attached, resolve_settings, text_config
from .hub import update_remote_code
from .length_scale import SCALE_MODULES
from .masks import sparse_attention_mask
from .models import unsupported_model

logger = logging.get_logger(__name__)

# Sub-models of these kinds keep transformers' attention when their composite model asks for a preset.
_OTHER_MODALITIES = ("vision_config", "audio_config", "vision_encoder", "speech_config")


def register() -> None:
    """Make the presets available as ``attn_implementation``; calling it again changes nothing."""
    for name in PRESETS:
        AttentionInterface.register(name, sparse_attention_forward)
        AttentionMaskInterface.register(name, sparse_attention_mask)
    if getattr(PreTrainedModel.post_init, "_sparse_attention", False):
        return
    # Known to every config class: from_pretrained(model, sparse_attention={...}) is accepted and stored.
    PreTrainedConfig.sparse_attention = None
    from_dict = PreTrainedConfig.__dict__["from_dict"].__func__
    PreTrainedConfig.from_dict = classmethod(_wrapped(from_dict, _from_dict))
    PreTrainedConfig.to_json_file = _wrapped(PreTrainedConfig.to_json_file, _to_json_file)
    from_config = PreTrainedModel.__dict__["_from_config"].__func__
    PreTrainedModel._from_config = classmethod(_wrapped(from_config, _from_config))
    for name, wrapper in (
        ("get_correct_attn_implementation", _get_correct_attn_implementation),
        ("set_attn_implementation", _set_attn_implementation),
        ("post_init", _post_init),
        ("_initialize_weights", _initialize_weights),
    ):
        setattr(PreTrainedModel, name, _wrapped(getattr(PreTrainedModel, name), wrapper))
    GenerationMixin.init_continuous_batching = _wrapped(
        GenerationMixin.init_continuous_batching, _init_continuous_batching
    )
    masking_utils._preprocess_mask_arguments = _wrapped(
        masking_utils._preprocess_mask_arguments, _preprocess_mask_arguments
    )


def _wrapped(original: Callable, wrapper: Callable) -> Callable:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    method._sparse_attention = True
    return method


def _from_dict(original: Callable, cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """A ``sparse_attention`` given at loading time changes single fields of the stored one."""
    given, stored = kwargs.get("sparse_attention"), config_dict.get("sparse_attention")
    if isinstance(given, Mapping) and isinstance(stored, Mapping):
        kwargs["sparse_attention"] = merge_settings(stored, for_preset(given, kwargs.get("attn_implementation")))
    return original(cls, config_dict, **kwargs)


def _from_config(original: Callable, cls: type, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """With an attention implementation of its own a model gets a config of its own: earlier models of it go on."""
    requested = kwargs.get("attn_implementation")
    if requested is not None:
        values = list(requested.values()) if isinstance(requested, Mapping) else [requested]
        values.append(text_config(config)._attn_implementation)
        if any(isinstance(value, str) and value in PRESETS for value in values):
            config = copy.deepcopy(config)
    return original(cls, config, **kwargs)


def _to_json_file(
    original: Callable, self: PreTrainedConfig, json_file_path: str | os.PathLike, *args: Any, **kwargs: Any
) -> None:
    """A checkpoint's config names its preset, and the code beside it that ``trust_remote_code=True`` runs."""
    path = Path(json_file_path)
    if path.name == CONFIG_NAME:
        preset, text = _requested_preset(self), text_config(self)
        if preset in PRESETS and text is self:
            resolve_settings(self, preset)
        if text.sparse_attention is not None and text._attn_implementation is not None:
            # A built model may have been switched since.
            self.attn_implementation = text.attn_implementation = text._attn_implementation
        update_remote_code(self, path.parent)
    original(self, json_file_path, *args, **kwargs)


def _requested_preset(config: PreTrainedConfig) -> str | None:
    """What the config asks for; with settings and no attention implementation, the preset of its settings."""
    if config._attn_implementation is None and config.sparse_attention is not None:
        return SparseAttentionConfig.from_dict(config.sparse_attention).preset
    return config._attn_implementation


def _get_correct_attn_implementation(
    original: Callable, self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
) -> str:
    """A config with settings and no attention implementation asks for the preset of its settings."""
    is_init_check = kwargs.get("is_init_check", args[0] if args else False)
    if is_init_check and text_config(self.config) is not self.config:
        requested_attention = _move_to_text_config(self.config, requested_attention)
    if requested_attention is None and (stored := self.config.sparse_attention) is not None:
        requested_attention = SparseAttentionConfig.from_dict(stored).preset
    return original(self, requested_attention, *args, **kwargs)


def _move_to_text_config(config: PreTrainedConfig, requested: str | None) -> str | None:
    """In a composite model the text model has the settings, and the other sub-models keep transformers' attention."""
    text = text_config(config)
    if config.sparse_attention is not None:
        given = for_preset(config.sparse_attention, requested)
        text.sparse_attention = merge_settings(text.sparse_attention or {}, given)
        config.sparse_attention = None
    if requested is None and text.sparse_attention is not None:
        requested = SparseAttentionConfig.from_dict(text.sparse_attention).preset
    if requested in PRESETS:
        for key in config.sub_configs:
            sub_config = getattr(config, key, None)
            if sub_config is not None:
                sub_config._attn_implementation = requested if holds(sub_config, text) else None
        config.attn_implementation = requested
    return requested


def _set_attn_implementation(
    original: Callable, self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """A preset that is switched on in a composite model is switched on in its text model."""
    if isinstance(attn_implementation, str) and attn_implementation in PRESETS:
        attn_implementation = _for_text_model(self.config, text_config(self.config), attn_implementation)
    original(self, attn_implementation, *args, **kwargs)


def _for_text_model(config: PreTrainedConfig, text: PreTrainedConfig, preset: str) -> str | dict[str, Any]:
    """``preset`` in the form that leaves the sub-models of ``config`` without ``text`` as they are."""
    if config is text:
        return preset
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {"": preset} | {key: _for_text_model(p, text, preset) for key, p in parts.items() if holds(p, text)}


def _post_init(original: Callable, self: PreTrainedModel) -> None:
    preset, config = self.config._attn_implementation, self.config
    if preset in PRESETS:
        if text_config(config) is config and any(is_attachable(module, config) for module in self.modules()):
            resolve_settings(config, preset)
            attach(self, config)
        is_text = getattr(config, "base_config_key", "") not in _OTHER_MODALITIES
        if is_text and not any(map(is_attached, self.modules())):
            raise unsupported_model(type(self).__name__, preset)
    elif config.sparse_attention is not None:
        config.attn_implementation = preset
        logger.warning(
            f"config.sparse_attention is set, but the model computes attn_implementation={preset!r}, as asked."
        )
    original(self)
    _shard_scales_by_heads(self)


def _shard_scales_by_heads(model: PreTrainedModel) -> None:
    """Extend the tensor-parallel plan of a model that has one: each process holds the scales of its own heads."""
    if getattr(model, "_tp_plan", None):
        for name, module in model.named_modules():
            if isinstance(module, SCALE_MODULES):
                model._tp_plan[re.sub(r"\.\d+\.", ".*.", name)] = "colwise"


def _initialize_weights(
    original: Callable, self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any
) -> None:
    """Scale modules have their own initial values, also when a checkpoint does not hold them."""
    if isinstance(module, SCALE_MODULES):
        if not getattr(module, "_is_hf_initialized", False):
            module.reset_parameters()
            module._is_hf_initialized = True
        return
    original(self, module, *args, **kwargs)


def _init_continuous_batching(original: Callable, self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """transformers' own refusal advises attention that computes something else."""
    preset = text_config(self.config)._attn_implementation
    if preset in PRESETS:
        raise ValueError(
            f"attn_implementation={preset!r} has no paged cache, which generate_batch and continuous batching need. "
            "Use model.generate with a left-padded batch; with sdpa or eager the model would compute other attention."
        )
    return original(self, *args, **kwargs)


def _preprocess_mask_arguments(original: Callable, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> tuple:
    """Packed documents need no mask of length x length: attention reads their boundaries from the position ids."""
    if config._attn_implementation in PRESETS:
        # The fifth argument; the one before it has another name in newer releases.
        if "position_ids" in kwargs:
            kwargs["position_ids"] = None
        else:
            args = (*args[:3], None, *args[4:])
        if torch.compiler.is_compiling() and config.sparse_attention is not None:
            # Read before the layers: torch cannot share a number that changes between graphs of checkpointed layers.
            SparseAttentionConfig(**config.sparse_attention)
    return original(config, *args, **kwargs)
