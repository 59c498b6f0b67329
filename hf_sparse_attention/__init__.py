"""ASEntmax attention for Hugging Face Transformers (arXiv 2506.16640)."""

__version__ = "0.1.0"

from typing import Any

from .config import PRESETS, SparseAttentionConfig
from .conversion import convert, revert
from .ops import sparse_attention
from .registration import register
from .training import AlphaSchedule, AlphaScheduleCallback, check_trainable, parameter_groups, set_alpha

register()

__all__ = [
    "PRESETS",
    "AlphaSchedule",
    "AlphaScheduleCallback",
    "SparseAttentionConfig",
    "SparseAttentionTrainer",
    "__version__",
    "check_trainable",
    "convert",
    "load_adapter",
    "lora_config",
    "parameter_groups",
    "register",
    "revert",
    "set_alpha",
    "sparse_attention",
]


def __getattr__(name: str) -> Any:
    # transformers.Trainer needs accelerate and takes seconds to import.
    if name == "SparseAttentionTrainer":
        from .trainer import SparseAttentionTrainer

        return SparseAttentionTrainer
    if name in ("load_adapter", "lora_config"):
        from . import peft

        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
