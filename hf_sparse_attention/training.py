"""What training needs: optimizer groups that leave the length scale undecayed, and a schedule for alpha."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import PRESETS, SparseAttentionConfig
from .conversion import text_config
from .length_scale import SCALE_MODULES, warn_frozen

# PEFT keeps a frozen original and one copy per adapter of a module in modules_to_save.
_PEFT_COPY = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+)(?=\.)")
# Vectors and norms are not decayed, as in transformers.Trainer.
_UNDECAYED_NAME = re.compile(r"bias|(?:^|[._])(?:layer|rms)?norm", re.IGNORECASE)


def scale_parameter_names(model: nn.Module) -> set[str]:
    """Names, as in ``model.named_parameters()``, of all length-scale parameters."""
    return {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, SCALE_MODULES)
        for name, _ in module.named_parameters(recurse=False)
    }


def without_scale(model: nn.Module, names: Iterable[str]) -> list[str]:
    """``names`` less the length-scale parameters: for overriding ``Trainer.get_decay_parameter_names``."""
    scale = scale_parameter_names(model)
    return [name for name in names if name not in scale]


def check_trainable(model: nn.Module) -> list[str]:
    """Names of the length-scale parameters that training would leave unchanged; warns if a layer's are all frozen.

    LoRA and the like freeze what they do not know: use :func:`hf_sparse_attention.lora_config`.

    Args:
        model: a model, or a PEFT wrapper around one.

    Returns:
        Their names in the base model, sorted, e.g. ``model.layers.0.self_attn.length_scale.beta_proj.weight``.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        for module in model.modules():
            if isinstance(getattr(module, "length_scale", None), nn.Module):
                warn_frozen(module.length_scale)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = dict(base.named_parameters())
    trained: dict[str, bool] = {}
    for full_name in scale_parameter_names(base):
        name = _PEFT_COPY.sub("", full_name)
        trained[name] = trained.get(name, False) or parameters[full_name].requires_grad
    return sorted(name for name, is_trained in trained.items() if not is_trained)


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float, scale_lr_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups: decayed weights, undecayed norms and biases, undecayed length scale with its own rate.

    Args:
        model: only its trainable parameters are taken.
        weight_decay: for the first group; the others have 0.
        lr: learning rate of the first two groups.
        scale_lr_multiplier: the length scale's learning rate is ``lr * scale_lr_multiplier``.
    """
    scale = scale_parameter_names(model)
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "undecayed": [], "length_scale": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim < 2 or _UNDECAYED_NAME.search(name)
            groups["length_scale" if name in scale else "undecayed" if undecayed else "decayed"].append(parameter)
    rates = {"decayed": lr, "undecayed": lr, "length_scale": lr * scale_lr_multiplier}
    return [
        {"params": groups[k], "lr": rates[k], "weight_decay": weight_decay if k == "decayed" else 0.0, "name": k}
        for k in groups
        if groups[k]
    ]


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Change the entmax exponent of a model in place; ``config.sparse_attention`` holds it from now on.

    Raises:
        ValueError: the model has no sparse attention, or alpha does not fit its preset.
    """
    config = _sparse_config(model)
    config.sparse_attention = SparseAttentionConfig.from_dict(config.sparse_attention, alpha=alpha).to_dict()


def get_alpha(model: nn.Module) -> float:
    """The entmax exponent that the model computes with.

    Raises:
        ValueError: the model has no sparse attention.
    """
    return _sparse_config(model).sparse_attention["alpha"]


def _sparse_config(model: nn.Module) -> PreTrainedConfig:
    config = text_config(model.config)
    if config.sparse_attention is None or config._attn_implementation not in PRESETS:
        raise ValueError(f"{type(model).__name__} has no sparse attention, and so no alpha")
    return config


class AlphaSchedule:
    """Moves alpha linearly from ``start`` to ``target`` over ``steps`` optimizer steps: for patching a softmax model.

    Call :meth:`step` with the number of finished optimizer steps before each step; it is a function of that number
    alone, so a resumed run needs no state.

    Args:
        model: a model with sparse attention; changed at once to the alpha of step 0.
        target: alpha from step ``steps`` on, in [1, 2]; None takes the model's present alpha, if that is not
            ``start``.
        steps: length of the ramp in optimizer steps.
        start: alpha at step 0.
        update_every: change alpha only every so many steps. A compiled model is compiled anew at each change, and
            ``torch._dynamo.config.recompile_limit`` (8) bounds how often.
    """

    def __init__(
        self, model: nn.Module, target: float | None, steps: int, start: float = 1.0, update_every: int = 1
    ) -> None:
        if steps < 1 or update_every < 1:
            raise ValueError(f"steps ({steps}) and update_every ({update_every}) must be at least 1")
        self.model = model
        self.target = get_alpha(model) if target is None else target
        if target is None and self.target == start:
            raise ValueError(
                f"the model's alpha is {start} already, perhaps from an earlier schedule, and no target is given: the "
                "schedule would change nothing. Give the alpha to reach, e.g. target=1.5."
            )
        self.start = start
        self.steps = steps
        self.update_every = update_every
        for alpha in (self.target, start):
            set_alpha(model, alpha)

    def alpha(self, step: int) -> float:
        """Alpha after ``step`` finished optimizer steps."""
        if step >= self.steps:
            return self.target
        shown = step - step % self.update_every
        return self.start + (self.target - self.start) * shown / self.steps

    def step(self, step: int) -> float:
        """Set and return the alpha for the optimizer step that follows ``step`` finished ones."""
        alpha = self.alpha(step)
        if alpha != get_alpha(self.model):
            set_alpha(self.model, alpha)
        return alpha


class AlphaScheduleCallback(TrainerCallback):
    """:class:`AlphaSchedule` for ``transformers.Trainer``; checkpoints within the ramp hold the alpha of their step.

    Args:
        model: the model that will be trained.
        steps: length of the ramp in optimizer steps.
        target: alpha at its end; None takes the alpha of the model's config when the callback is made.
        start, update_every: see :class:`AlphaSchedule`.
    """

    def __init__(
        self, model: nn.Module, steps: int, target: float | None = None, start: float = 1.0, update_every: int = 1
    ) -> None:
        self.schedule = AlphaSchedule(model, target, steps, start, update_every)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.schedule.step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.schedule.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # The history was written before callbacks are told, trackers and the console come after.
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry["alpha"] = get_alpha(self.schedule.model)
