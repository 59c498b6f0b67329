"""Sparse attention operators: one validated function, several backends with the same results."""

from .api import IMPLEMENTATIONS, sparse_attention
from .visibility import Visibility, resolve_visibility

__all__ = ["IMPLEMENTATIONS", "Visibility", "resolve_visibility", "sparse_attention"]
