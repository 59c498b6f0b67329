"""Which weights of a training of synthetic.py are kept: those that solve the most rows at a longer length."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from synthetic_training import Trainer
from torch import Tensor

from hf_sparse_attention.data.synthetic import Task
from hf_sparse_attention.evaluation.synthetic import LadderOptions, measure


class Selection:
    """Looks at a model now and then while it trains, and keeps a copy of its best weights.

    Better is what has more rows right, or as many and more tokens; of equals the later, so that a length at which
    nothing is right, or everything, does not keep the weights of an early step.

    Args:
        task, length: of the rows that are looked at.
        ladder: how; its seed should be that of no test.

    Attributes:
        curve: what was seen, ``{"step": [...], "exact_match": [...], "token_accuracy": [...]}``.
        step: of the weights that are kept, None before the first look.
    """

    def __init__(self, task: Task, length: int, ladder: LadderOptions) -> None:
        self.task, self.length = task, length
        self.ladder = dataclasses.replace(ladder, generate=0)
        self.curve: dict[str, list[float]] = {"step": [], "exact_match": [], "token_accuracy": []}
        self.step: int | None = None
        self.weights: dict[str, Tensor] = {}

    def look(self, trainer: Trainer, step: int) -> tuple[float, float]:
        """Measure the trainer's model after ``step`` steps; its time is none of the training's.

        Returns:
            Exact match and token accuracy.
        """
        began = time.monotonic()
        trainer.wait()
        trainer.model.eval()
        cell = measure(trainer.model, self.task, self.length, self.ladder)
        trainer.model.train()
        seen = cell.exact_match, cell.token_accuracy
        if self.step is None or seen >= self._best():
            self.step = step
            self.weights = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
        for values, value in zip(self.curve.values(), (step, *seen)):
            values.append(value)
        trainer.wait()
        trainer.aside += time.monotonic() - began
        return seen

    def _best(self) -> tuple[float, float]:
        index = self.curve["step"].index(self.step)
        return self.curve["exact_match"][index], self.curve["token_accuracy"][index]

    def apply(self, model: torch.nn.Module) -> None:
        """Give the model the weights that are kept."""
        model.load_state_dict(self.weights)

    def describe(self) -> dict[str, Any]:
        """What makes two looks comparable, as JSON values."""
        ladder = self.ladder
        return {"length": self.length, "samples": ladder.samples, "seed": ladder.seed, "dtype": str(ladder.dtype)}

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "step": self.step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curve, self.step, self.weights = state["curve"], state["step"], state["weights"]
