"""``transformers.Trainer`` that knows the length scale."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from .training import check_trainable, without_scale


class SparseAttentionTrainer(Trainer):
    """A ``Trainer`` whose weight decay leaves the length-scale parameters out; it warns if they are frozen."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        # A compiled model cannot warn from its forward pass.
        check_trainable(self.model)
        return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return without_scale(model, super().get_decay_parameter_names(model))
