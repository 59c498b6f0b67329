"""Adapters (PEFT) on models with sparse attention.

A LoRA adapter is right only together with the attention it was trained under: :func:`lora_config` makes the adapter
hold the learned length scale, and its ``adapter_config.json`` the attention settings, which :func:`load_adapter`
applies to the base model or checks against it.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from .config import PRESETS, SparseAttentionConfig
from .conversion import convert, text_config

SCALE_MODULE = "length_scale"
# What may differ between an adapter and the one that replaces it.
_FREE_LORA_FIELDS = (
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "sparse_attention",
)
_HUB_KEYWORDS = ("subfolder", "revision", "cache_dir", "token")
# How attention is computed, not what.
_FREE_FIELDS = ("backend",)


@dataclass
class SparseLoraConfig(LoraConfig):
    """A ``LoraConfig`` that keeps the attention settings in ``adapter_config.json``; made by :func:`lora_config`.

    Plain PEFT loads such an adapter too, warns that it ignores ``sparse_attention``, and leaves it to the user that
    the base model has these settings.
    """

    sparse_attention: dict[str, Any] | None = field(
        default=None, metadata={"help": "fields of SparseAttentionConfig that the adapter was trained under"}
    )
    # Not a field: the config of the model, whose alpha may move until the adapter is saved.
    _model_config = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse_attention is not None:
            self.sparse_attention = SparseAttentionConfig.from_dict(self.sparse_attention).to_dict()

    def follow(self, model_config: PreTrainedConfig) -> None:
        """Take the settings from ``model_config`` whenever this config is saved."""
        self._model_config = model_config
        self.sparse_attention = dict(model_config.sparse_attention)

    def to_dict(self) -> dict[str, Any]:
        if self._model_config is not None:
            self.sparse_attention = dict(self._model_config.sparse_attention)
        return super().to_dict()

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> SparseLoraConfig:
        settings = kwargs.pop("sparse_attention", None)
        # PEFT picks the class by peft_type, and copes with fields of other versions.
        plain = super().from_peft_type(**kwargs)
        if not isinstance(plain, LoraConfig):
            raise ValueError(
                f"a {plain.peft_type.value} adapter, not LoRA; load it with peft.PeftModel.from_pretrained"
            )
        return cls.extend(plain, settings)

    @classmethod
    def extend(cls, plain: LoraConfig, settings: dict[str, Any] | None = None) -> SparseLoraConfig:
        """A plain config with attention settings added."""
        return cls(sparse_attention=settings, **{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})


def lora_config(model: PreTrainedModel | PeftModel, **kwargs: Any) -> SparseLoraConfig:
    """The LoRA config that trains and stores everything sparse attention needs.

    Args:
        model: a model with sparse attention, loaded with a preset or changed by :func:`hf_sparse_attention.convert`.
        **kwargs: fields of ``LoraConfig``, e.g. ``r=16, use_dora=True``. The length scale is added to
            ``modules_to_save``; ``target_modules`` is ``"all-linear"`` and ``task_type`` ``"CAUSAL_LM"`` by default.

    Raises:
        ValueError: the model has no sparse attention.
    """
    config = text_config(model.config)
    if not _has_sparse_attention(config):
        raise ValueError(
            f"{type(model).__name__} has no sparse attention; call hf_sparse_attention.convert(model) or load it with "
            "attn_implementation='asentmax' first. For other models use peft.LoraConfig."
        )
    saved = list(kwargs.pop("modules_to_save", None) or [])
    if config.sparse_attention["length_scaling"] != "none" and SCALE_MODULE not in saved:
        saved.append(SCALE_MODULE)
    kwargs = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **kwargs}
    result = SparseLoraConfig(modules_to_save=saved or None, **kwargs)
    result.follow(config)
    return result


def load_adapter(
    model: PreTrainedModel | PeftModel,
    adapter: str | os.PathLike,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Load an adapter that was trained with :func:`lora_config`.

    Args:
        model: the base model, which is converted as the adapter says if it has no sparse attention yet; or a PEFT
            model, to which the adapter is added (``model.set_adapter`` then switches between adapters).
        adapter: folder or Hub repository of the adapter.
        adapter_name: an adapter of that name which is there already is overwritten in place (a hot-swap, without
            recompilation); the LoRA fields of both must be equal.
        is_trainable, **kwargs: as in ``PeftModel.from_pretrained``.

    Raises:
        ValueError: the adapter holds no attention settings, they are not the model's, or the adapter to be overwritten
            has other LoRA fields. The model is left unchanged.
    """
    config = _read_config(adapter, kwargs)
    base_config = text_config(model.config)
    if not isinstance(model, PeftModel):
        if not _has_sparse_attention(base_config):
            settings = dict(config.sparse_attention)
            convert(model, settings.pop("preset"), **settings)
        _check_settings(base_config, config, adapter)
        config.follow(base_config)
        return PeftModel.from_pretrained(
            model, adapter, adapter_name, is_trainable=is_trainable, config=config, **kwargs
        )
    _check_settings(base_config, config, adapter)
    is_new = adapter_name not in model.peft_config
    if not is_new:
        _check_replaceable(model.peft_config[adapter_name], config, adapter, adapter_name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Unexpected keyword arguments \['sparse_attention'\]")
        model.load_adapter(adapter, adapter_name, is_trainable=is_trainable, **kwargs)
    if is_new:
        loaded = SparseLoraConfig.extend(model.peft_config[adapter_name])
        loaded.follow(base_config)
        model.peft_config[adapter_name] = loaded
    return model


def _read_config(adapter: str | os.PathLike, kwargs: dict[str, Any]) -> SparseLoraConfig:
    hub = {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}
    try:
        config = SparseLoraConfig.from_pretrained(str(adapter), **hub)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{adapter}: {error}") from error
    if config.sparse_attention is None:
        raise ValueError(
            f"{adapter}: adapter_config.json has no sparse_attention, so it is not known which attention the adapter "
            "was trained under. Give the base model that attention and use peft.PeftModel.from_pretrained."
        )
    return config


def _has_sparse_attention(config: PreTrainedConfig) -> bool:
    return config._attn_implementation in PRESETS and config.sparse_attention is not None


def _check_settings(config: PreTrainedConfig, adapter_config: SparseLoraConfig, adapter: str | os.PathLike) -> None:
    if not _has_sparse_attention(config):
        raise ValueError(
            f"{adapter} was trained under sparse attention, and the model, which has other adapters, computes "
            f"attn_implementation={config._attn_implementation!r}. Load the adapter into a model of its own."
        )
    has = config.sparse_attention
    differing = [
        f"{name} {value!r} (the model has {has[name]!r})"
        for name, value in adapter_config.sparse_attention.items()
        if name not in _FREE_FIELDS and has[name] != value
    ]
    if differing:
        raise ValueError(
            f"{adapter} was trained under other attention settings than the model's: {', '.join(differing)}. Load it "
            "into a model without sparse attention, which is then converted to these settings."
        )


def _check_replaceable(old: PeftConfig, new: SparseLoraConfig, adapter: str | os.PathLike, name: str) -> None:
    has, wants = old.to_dict(), new.to_dict()
    for field_name, value in wants.items():
        if field_name not in _FREE_LORA_FIELDS and _comparable(has.get(field_name)) != _comparable(value):
            raise ValueError(
                f"{adapter} cannot replace the adapter {name!r} in place: its {field_name} is {value!r}, not "
                f"{has.get(field_name)!r}. Load it under another adapter_name."
            )


def _comparable(value: Any) -> Any:
    # Module names are a list in the file and a set in use.
    return sorted(value) if isinstance(value, (list, set, tuple)) else value
