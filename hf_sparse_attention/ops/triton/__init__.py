"""alpha-entmax attention in Triton: see the README beside this file."""

from .attention import triton_attention, unsupported_reason

__all__ = ["triton_attention", "unsupported_reason"]
