"""``transformers.Trainer`` that does not decay the length scale."""

from __future__ import annotations

from torch import nn
from transformers import Trainer

from .training import without_scale


class SparseAttentionTrainer(Trainer):
    """A ``Trainer`` whose weight decay leaves the length-scale parameters out; all else is unchanged."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return without_scale(model, super().get_decay_parameter_names(model))
