"""ASEntmax attention for Hugging Face Transformers (arXiv 2506.16640)."""

__version__ = "0.1.0"

from .config import PRESETS, SparseAttentionConfig

__all__ = ["PRESETS", "SparseAttentionConfig", "__version__"]
