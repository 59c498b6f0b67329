"""The ALiBi slope of each head, also under NAPE (arXiv 2506.16640)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SparseAttentionConfig


def alibi_slopes(
    settings: SparseAttentionConfig,
    num_heads: int,
    device: torch.device | str | None = None,
    all_heads: bool = False,
) -> Tensor:
    """Slope of each query head, float32, shape (num_heads,); zero for heads without ALiBi.

    The first ``settings.num_alibi_heads(num_heads, all_heads)`` heads get 1, 1/2, 1/3, ... (``linear``) or
    ``2 ** (-8 i / count)`` for i = 1, 2, ... (``geometric``, arXiv 2108.12409). Computed on the device, as a CUDA
    graph needs it.
    """
    count = settings.num_alibi_heads(num_heads, all_heads)
    rank = torch.arange(1, num_heads + 1, device=device, dtype=torch.float32)
    slopes = 1.0 / rank if settings.alibi_slopes == "linear" else torch.exp2(-8.0 * rank / max(count, 1))
    return torch.where(rank <= count, slopes, torch.zeros_like(slopes))
