"""Seeing the attention weights of a model, one layer at a time, through hooks that are there only meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SparseAttentionConfig
from ..conversion import is_attached
from ..length_scale import query_scale
from ..masks import Visibility, visibility
from ..positions import alibi_slopes


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """What one attention layer did in one forward.

    Attributes:
        layer: number of the layer among the model's attention layers, from 0.
        weights: (B, H, Q, K), in the dtype of the model.
        visible: the keys that each query sees; ``visible.visible_keys`` is n, integer (B or 1, H or 1, Q).
        slopes: ALiBi slope of each head, float32 (H,), 0 without ALiBi.
        scaled: whether the length scale applies to a head, bool (H,).
        beta, gamma: parameters of the length scale, float32, broadcastable to (B, H, Q); None without one. With
            ``length_scaling="log"`` beta is the factor b, and gamma 1.
        scale: t, the factor of the scores (the inverse of a temperature), float32 (B, H, Q).
    """

    layer: int
    weights: Tensor
    visible: Visibility
    slopes: Tensor
    scaled: Tensor
    beta: Tensor | None
    gamma: Tensor | None
    scale: Tensor

    def visible_mask(self) -> Tensor:
        """The visible keys as bool, broadcastable to (B, H, Q, K)."""
        if self.visible.attention_mask is not None:
            return self.visible.attention_mask
        keys = torch.arange(self.weights.shape[-1], device=self.weights.device)
        start, end = self.visible.key_start, self.visible.key_end
        return ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]


@contextmanager
def observe_attention(model: nn.Module, receive: Callable[[LayerAttention], None]) -> Iterator[None]:
    """Within this context, every forward of ``model`` hands each layer's attention to ``receive``.

    The layers compute their weights densely, (B, H, Q, K) of one layer at a time: they are dropped when ``receive``
    returns, so it must not keep them. Outputs of the model are the same up to rounding. All hooks are gone when the
    context ends, also by an error.

    Raises:
        ValueError: no layer of the model has sparse attention.
    """
    layers = [module for module in model.modules() if is_attached(module)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention layer of this package. Load it with attn_implementation= one of "
            "the presets, or call hf_sparse_attention.convert(model, 'softmax') to see what it computes now."
        )
    handles = []
    try:
        for number, module in enumerate(layers):
            handles.append(module.register_forward_pre_hook(_ask_for_weights, with_kwargs=True))
            handles.append(module.register_forward_hook(_Receiver(number, receive), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_map(model: nn.Module, tokens: Sequence[int] | Tensor, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """One head's weights on one text, float32 (L, L) on the CPU, and which keys are visible, bool (L, L).

    Args:
        tokens: token ids (L,).
        layer, head: from 0, or from -1 backwards.

    Raises:
        ValueError: there is no such layer or head, or no layer of the model has sparse attention.
    """
    layers = sum(map(is_attached, model.modules()))
    if layers and not -layers <= layer < layers:
        raise ValueError(f"layer is {layer}; allowed: {-layers} to {layers - 1}.")
    found: list[tuple[Tensor, Tensor]] = []

    def receive(attention: LayerAttention) -> None:
        if attention.layer != layer % layers:
            return
        heads = attention.weights.shape[1]
        if not -heads <= head < heads:
            raise ValueError(f"head is {head}; allowed: {-heads} to {heads - 1}.")
        visible = attention.visible_mask().expand(attention.weights.shape)
        # Clones: a view would keep all heads in memory.
        found.append((attention.weights[0, head].float().cpu().clone(), visible[0, head].cpu().clone()))

    with observe_attention(model, receive):
        run(model, tokens)
    return found[0]


@torch.no_grad()
def run(model: nn.Module, tokens: Sequence[int] | Tensor) -> None:
    """One forward over a text (L,) by itself, in evaluation mode, for the sake of its attention."""
    ids = torch.as_tensor(tokens, dtype=torch.long, device=next(model.parameters()).device)
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(f"tokens have shape {tuple(ids.shape)}; allowed: (length,) with at least one token.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Logits of a long text can take more memory than its attention.
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        model(input_ids=ids[None], use_cache=False, **options)
    finally:
        for module in training:
            module.training = True


def _ask_for_weights(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "output_attentions": True}


class _Receiver:
    """Forward hook of one layer: hands its attention on, and drops the weights from its output."""

    def __init__(self, number: int, receive: Callable[[LayerAttention], None]) -> None:
        self.number = number
        self.receive = receive

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple:
        result, weights = output
        if weights is None:
            raise ValueError(
                f"the model computes attn_implementation={module.config._attn_implementation!r}, which gives no "
                "weights; call hf_sparse_attention.convert(model, ...) with one of the presets."
            )
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.receive(_describe(self.number, module, hidden_states, weights, kwargs))
        return result, None


def _describe(
    number: int, module: nn.Module, hidden_states: Tensor, weights: Tensor, kwargs: dict[str, Any]
) -> LayerAttention:
    settings = SparseAttentionConfig.from_dict(module.config.sparse_attention)
    heads = weights.shape[1]
    visible = visibility(
        kwargs.get("attention_mask"),
        weights[..., :0],  # only its shape and device are looked at
        weights.shape[-1],
        is_causal=getattr(module, "is_causal", True),
        # Layers that differ have their own; the others pass on the config's.
        sliding_window=getattr(module, "sliding_window", getattr(module.config, "sliding_window", None)),
        position_ids=kwargs.get("position_ids"),
        cu_seqlens=kwargs.get("cu_seq_lens_q"),
        seq_idx=kwargs.get("seq_idx"),
    )
    slopes = alibi_slopes(settings, heads, weights.device, module.alibi_on_all_heads)
    length_scale = getattr(module, "length_scale", None)
    beta = gamma = None
    scale = torch.ones(weights.shape[:3], device=weights.device)
    scaled = torch.zeros(heads, dtype=torch.bool, device=weights.device)
    if length_scale is not None:
        beta, gamma = length_scale(hidden_states)
        scaled = (slopes == 0) | settings.scale_alibi_heads
        scale = torch.where(scaled[:, None], query_scale(settings, beta, gamma, visible.visible_keys), scale)
    return LayerAttention(number, weights, visible, slopes, scaled, beta, gamma, scale)
