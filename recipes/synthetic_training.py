"""The training loop of synthetic.py: rows drawn on the device, the whole step captured in CUDA graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from synthetic_model import fused_norms, scaled_queries, target_loss
from synthetic_options import TrainOptions
from transformers import PreTrainedModel

import hf_sparse_attention
from hf_sparse_attention.data.synthetic import IGNORED_LABEL, PAD, Samples, Task
from hf_sparse_attention.data.synthetic.base import uniform_below
from hf_sparse_attention.training import get_alpha

# Steps before a capture: they compile kernels and make the optimizer's state.
_EAGER_STEPS = 3


class NonFiniteLoss(RuntimeError):
    """Training cannot go on: the loss is NaN or infinite."""


def without_start(samples: Samples, share: float) -> Samples:
    """The rows, a ``share`` of them without their first token."""
    if not share:
        return samples
    dropped = torch.rand(samples.input_ids.shape[0], 1, device=samples.input_ids.device) < share
    shifted = (torch.nn.functional.pad(t[:, 1:], (0, 1), value=v) for t, v in zip(samples, (PAD, IGNORED_LABEL)))
    return Samples(*(torch.where(dropped, other, rows) for rows, other in zip(samples, shifted)))


class Trainer:
    """Model, optimizer and the step, which on a CUDA device is captured once for each padded length.

    Attributes:
        captured: seconds spent on compiling and capturing.
        aside: seconds in which something else was done with the model.
        stages: a task for each.
        task: that of the next steps.
    """

    def __init__(
        self, model: PreTrainedModel, tasks: Task | list[Task], options: TrainOptions, device: torch.device
    ) -> None:
        self.model, self.options, self.device = model, options, device
        self.stages = options.all_stages([tasks] if isinstance(tasks, Task) else tasks)
        self.task = self.stages[0]
        self.graphed = options.cuda_graph and device.type == "cuda"
        groups = hf_sparse_attention.parameter_groups(
            model, options.weight_decay, options.learning_rate, options.scale_lr_multiplier
        )
        self.rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates):
            # On the device, so that a captured step reads the rate of its replay.
            group["lr"] = torch.tensor(rate, device=device)
        betas = (options.adam_beta1, options.adam_beta2)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused, capturable=fused)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        compiled = options.compile and device.type == "cuda"
        self.compiled = torch.compile(target_loss, dynamic=False) if compiled else None
        self.shortest, self.longest = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        # Of the queries of each row, see query_jitter; kept, because a compiled step refers to it.
        self.factor = torch.ones(options.batch_size, 1, 1, device=device)
        # Sums of loss, exact match and gradient norm since they were last read.
        self.sums = torch.zeros(3, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.captured = self.aside = 0.0
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def set_rate(self, factor: float) -> None:
        """Learning rates of the next steps, as a share of their peaks."""
        with self._on_stream():
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"].fill_(rate * factor)

    def set_lengths(self, low: int, high: int) -> None:
        """Sources of the next steps."""
        with self._on_stream():
            self.shortest.fill_(low)
            self.longest.fill_(high)

    def set_stage(self, stage: int) -> None:
        """The task of the next steps, which is part of a captured graph."""
        if self.stages[stage] != self.task:
            self.task = self.stages[stage]
            self.forget()

    def set_alpha(self, alpha: float) -> None:
        """The exponent is part of a captured graph."""
        hf_sparse_attention.set_alpha(self.model, alpha)
        self.forget()

    def wait(self) -> None:
        """Until the device has done what it was given, on any stream."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Wait for the device and drop captured steps, and the memory that they hold."""
        self.wait()
        self.graphs.clear()

    def steps(self, limit: int) -> int:
        """One step with sources of at most ``limit`` tokens, or some where it is the first of its length.

        Returns:
            How many steps were done.
        """
        if self.graphed and limit not in self.graphs:
            return self._capture(limit)
        with self._on_stream():
            if self.graphed:
                self.graphs[limit].replay()
            else:
                self._step(limit)
        return 1

    def _capture(self, limit: int) -> int:
        began = time.monotonic()
        with self._on_stream():
            for _ in range(_EAGER_STEPS):
                self._step(limit)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        # Gradients of other graphs must not be added to.
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            self._step(limit)
        self.graphs[limit] = graph
        self.captured += time.monotonic() - began
        return _EAGER_STEPS

    def _step(self, limit: int) -> None:
        high = self.longest - self.shortest + 1
        lengths = self.shortest + uniform_below(high, (self.options.batch_size,), None)
        samples = without_start(self.task.sample_lengths(lengths, limit), self.options.start_dropout)
        with fused_norms(self.model), self._jittered(), self._autocast():
            forward = self.compiled if self._is_final(limit) and self.compiled else target_loss
            loss, exact = forward(self.model, *samples, self.task.label_tokens(limit))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.optimizer.step()
        self.sums += torch.stack((loss.detach(), exact, norm))

    def _is_final(self, limit: int) -> bool:
        """Whether these are the rows of most of the training: a shape that is worth compiling for."""
        return self.task == self.stages[-1] and limit == self.options.lengths(self.task)[1]

    def _jittered(self) -> contextlib.AbstractContextManager:
        if self.options.query_jitter == 1:
            return contextlib.nullcontext()
        self.factor.uniform_(self.options.query_jitter, 1.0)
        return scaled_queries(self.model, self.factor)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.options.mixed_precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _on_stream(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def read(self) -> list[float]:
        """Sums of loss, exact match and gradient norm since the last call; waits for the device."""
        with self._on_stream():
            values = self.sums.tolist()
            self.sums.zero_()
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        self.wait()
        random = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "random": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forget()
        self.model.load_state_dict(state["model"])
        own = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, own):
            group["lr"] = rate
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"].cpu(), self.device)
        else:
            torch.set_rng_state(state["random"].cpu())


@dataclasses.dataclass
class Progress:
    """Where a training is, by steps or by the clock, whichever is further.

    Attributes:
        step: finished steps.
        seconds: of training, as last read.
        warm_seconds: of them until the end of the warm-up.
        stage: of the next step, from 0.
    """

    options: TrainOptions
    step: int = 0
    seconds: float = 0.0
    warm_seconds: float = 0.0
    stage: int = 0

    def share(self) -> float:
        """Of the whole training, 0 to 1."""
        steps, seconds = self.options.max_steps, self.options.max_seconds
        if steps == 0:
            return 1.0
        return min(1.0, max(self.step / steps if steps else 0.0, self.seconds / seconds if seconds else 0.0))

    def rate(self) -> float:
        """Factor of the learning rate for the next step: linear warm-up, then cosine."""
        warm, final = self.options.warmup_steps, self.options.final_learning_rate
        if self.step < warm:
            return (self.step + 1) / warm
        steps, seconds = self.options.max_steps, self.options.max_seconds
        done = (self.step - warm) / max(1, steps - warm) if steps else 0.0
        if seconds:
            done = max(done, (self.seconds - self.warm_seconds) / max(1e-9, seconds - self.warm_seconds))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def lengths(self, low: int, high: int) -> tuple[int, int]:
        """Shortest and longest source of the next step, from those of the whole training."""
        if self.options.curriculum:
            start = max(low, min(high, self.options.curriculum_length or low))
            high = start + round((high - start) * min(1.0, self.share() / self.options.curriculum))
        if self.options.stage_lengths:
            high = min(high, self.options.stage_lengths[self.stage])
        return low, high

    def alpha(self, target: float) -> float:
        """Entmax exponent of the next step."""
        if not self.options.alpha_share:
            return target
        stages = self.options.alpha_stages
        stage = min(stages, math.floor(self.share() / self.options.alpha_share * stages))
        return self.options.alpha_start + (target - self.options.alpha_start) * stage / stages


def train(
    trainer: Trainer, progress: Progress, log: Path, stop: Any, alpha: float | None = None
) -> Iterator[dict[str, float]]:
    """Train until the end or a signal; yields and logs a line every ``logging_steps`` steps.

    Args:
        log: gets the lines, as JSON.
        stop: its ``number`` is asked for a signal after each step.
        alpha: the exponent to reach; None for the model's own.

    Raises:
        NonFiniteLoss: between two lines the loss has become NaN or infinite.
    """
    options = trainer.options
    low, full = options.lengths(trainer.task)
    target = get_alpha(trainer.model) if alpha is None else alpha
    trainer.model.train()
    began, last = None, progress.step
    base = progress.seconds
    prepared = 0.0
    applied: tuple[int, int] | None = None
    while progress.share() < 1 and stop.number is None:
        wanted = progress.alpha(target)
        if wanted != get_alpha(trainer.model):
            trainer.set_alpha(wanted)
        trainer.set_stage(progress.stage)
        lengths = progress.lengths(low, full)
        if lengths != applied:
            trainer.set_lengths(*lengths)
            applied = lengths
        trainer.set_rate(progress.rate())
        limit = min(full, -(-lengths[1] // options.pad_multiple) * options.pad_multiple)
        done = trainer.steps(limit)
        if began is None:
            # What the first steps compile is not training time, nor are later captures.
            began, prepared = time.monotonic(), trainer.captured + trainer.aside
        before = progress.step
        progress.step += done
        if progress.step <= options.warmup_steps:
            progress.warm_seconds = progress.seconds
        finished = options.max_steps is not None and progress.step >= options.max_steps
        crossed = before // options.logging_steps < progress.step // options.logging_steps
        if not (crossed or finished):
            continue
        loss, exact, norm = (value / (progress.step - last) for value in trainer.read())
        progress.seconds = base + time.monotonic() - began - (trainer.captured + trainer.aside - prepared)
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the loss is {loss} between steps {last} and {progress.step}")
        line = {
            "step": progress.step,
            "samples": progress.step * options.batch_size,
            "seconds": round(progress.seconds, 2),
            "loss": loss,
            "exact_match": exact,
            "grad_norm": norm,
            "learning_rate": options.learning_rate * progress.rate(),
            "longest": lengths[1],
            "alpha": wanted,
            "stage": progress.stage,
        }
        last = progress.step
        if exact >= options.stage_exact and progress.stage + 1 < len(trainer.stages):
            progress.stage += 1
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        yield line
    if stop.number is None and get_alpha(trainer.model) != target:
        trainer.set_alpha(target)
