"""The length scale t of a query: what multiplies its scores, from the number n of keys it sees.

Adaptive and learned: ``t = delta + beta * log(n + 1) ** gamma`` (ASEntmax, arXiv 2506.16640);
log: ``t = b * log(n + 1)`` (Scalable-Softmax, arXiv 2501.19399).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import logging

from .config import SparseAttentionConfig
from .masks import memoised

logger = logging.get_logger(__name__)


class HeadProjection(nn.Module):
    """Hidden states (B, L, in_features) to one number per head (B, L, heads).

    Not an ``nn.Linear``: quantisers and PEFT's ``all-linear`` would replace it, and a model's weight initialisation
    would overwrite its zeros.
    """

    def __init__(self, in_features: int, num_heads: int, bias: bool, bias_init: float = 0.0) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = num_heads
        self.bias_init = bias_init
        self.weight = nn.Parameter(torch.empty(num_heads, in_features))
        self.bias = nn.Parameter(torch.empty(num_heads)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Zero weights: with random ones associative recall did not train.
        init.zeros_(self.weight)
        if self.bias is not None:
            init.constant_(self.bias, self.bias_init)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, heads={self.out_features}, bias={self.bias is not None}"


class HeadConstant(nn.Module):
    """One learned number per head, (1, 1, heads); a 2-D weight, which tensor parallelism can split by heads."""

    def __init__(self, num_heads: int, value: float) -> None:
        super().__init__()
        self.out_features = num_heads
        self.value = value
        self.weight = nn.Parameter(torch.empty(num_heads, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.value)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight.mT[None].to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.weight.shape[0]}"


SCALE_MODULES = (HeadProjection, HeadConstant)


class LengthScale(nn.Module):
    """The learned part of t for one attention layer.

    Args:
        settings: gives the kind (``length_scaling``), ``gamma_range``, ``positive_gamma``, ``projection_bias``,
            ``beta_bias_init``.
        hidden_size: features of the hidden states that enter the attention layer.
        num_heads: query heads.
    """

    def __init__(self, settings: SparseAttentionConfig, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.kind = settings.length_scaling
        self.delta = settings.delta
        self.gamma_range = settings.gamma_range
        self.positive_gamma = settings.positive_gamma
        if self.kind == "adaptive":
            bias = settings.projection_bias
            self.beta_proj = HeadProjection(hidden_size, num_heads, bias, settings.beta_bias_init)
            self.gamma_proj = HeadProjection(hidden_size, num_heads, bias)
        elif self.kind == "learned":
            self.beta = HeadConstant(num_heads, settings.beta_bias_init)
            self.gamma = HeadConstant(num_heads, 0.0)
        elif self.kind == "log":
            self.factor = HeadConstant(num_heads, 1.0)
        else:
            raise ValueError(f"length_scaling {self.kind!r} has no parameters")

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, hidden) to beta and gamma, float32, each broadcastable to (B, heads, L)."""
        if self.kind == "log":
            factor = self.factor(hidden_states).transpose(1, 2).float()
            return factor, torch.ones_like(factor)
        if self.kind == "adaptive":
            raw = self.beta_proj(hidden_states), self.gamma_proj(hidden_states)
        else:
            raw = self.beta(hidden_states), self.gamma(hidden_states)
        raw_beta, raw_gamma = (values.transpose(1, 2).float() for values in raw)
        # softplus as -logsigmoid(-x): F.softplus before a transpose breaks its backward under aot_eager.
        share = torch.tanh(raw_gamma)
        if self.positive_gamma:
            share = 0.5 + 0.5 * share
        return -F.logsigmoid(-raw_beta), self.gamma_range * share


def warn_frozen(scale: nn.Module) -> None:
    """Say, once per process, that training leaves ``scale`` (a length scale or what wraps it) as it is, if so."""
    if any(parameter.requires_grad for parameter in scale.parameters()):
        return
    logger.warning_once(
        "The length scale of sparse attention (modules named length_scale) is frozen while other parameters train: "
        "attention keeps the temperature it has now. With LoRA use hf_sparse_attention.lora_config(model, ...), which "
        "trains and stores it; other PEFT methods need modules_to_save=['length_scale'], and those without that "
        "option (prefix tuning) cannot train it. hf_sparse_attention.check_trainable(model) lists the parameters."
    )


def query_scale(settings: SparseAttentionConfig, beta: Tensor, gamma: Tensor, visible_keys: Tensor) -> Tensor:
    """t of every query, float32 (B, heads, L).

    Args:
        settings: gives ``delta`` and the kind of length scaling.
        beta, gamma: from :class:`LengthScale`, broadcastable to (B, heads, L).
        visible_keys: number n of keys each query sees, integer (B or 1, heads or 1, L). A query with none gets the
            scale of n = 1: its output is zero whatever the scale.
    """
    log_log_n = memoised(
        (visible_keys,), lambda: torch.log(torch.log1p(visible_keys.clamp(min=1).float())), "log log n"
    )
    offset = 0.0 if settings.length_scaling == "log" else settings.delta
    return offset + beta * torch.exp(gamma * log_log_n)
