"""Exact match on the synthetic tasks, at lengths far beyond those of the training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.synthetic import EOS, IGNORED_LABEL, PAD, Samples, Task
from ..data.synthetic.datasets import BLOCK, draw_block


@dataclass(frozen=True)
class Cell:
    """Exact match at one length.

    Attributes:
        length: of the source.
        row_tokens: tokens of a row.
        samples: how many were measured.
        exact_match: share whose whole target is right.
        low, high: its Wilson interval of 95 %.
        token_accuracy: share of right target tokens, each with the right ones before it.
        generated: samples that were generated token by token as well.
        generated_exact: how many of these were right when generated.
        generated_agree: how many of these were right, or wrong, under both ways to decide it.
        seconds: what it took.
    """

    length: int
    row_tokens: int
    samples: int
    exact_match: float
    low: float
    high: float
    token_accuracy: float
    generated: int
    generated_exact: int
    generated_agree: int
    seconds: float


@dataclass(frozen=True)
class LadderOptions:
    """How a ladder of lengths is measured.

    Attributes:
        samples: per length, up to ``full_length``; beyond it their number falls with the length.
        full_length: longest source with all samples.
        min_samples: fewest samples.
        batch_tokens: about how many tokens go through the model at once.
        generate: samples to generate per length, to check the way exact match is decided.
        generate_tokens: lengths with longer targets are not generated.
        generate_length: longer sources are not generated: their masks are dense.
        seconds: longer lengths are left out after so many; None: no limit.
        seed: of the samples.
        dtype: autocast to it; None: as the model is.
    """

    samples: int = 1000
    full_length: int = 4096
    min_samples: int = 32
    batch_tokens: int = 131072
    generate: int = 4
    generate_tokens: int = 160
    generate_length: int = 8192
    seconds: float | None = None
    seed: int = 1
    dtype: torch.dtype | None = None

    def count(self, length: int) -> int:
        """Samples at a length."""
        if length <= self.full_length:
            return self.samples
        return min(self.samples, max(self.min_samples, self.samples * self.full_length // length))


def wilson(successes: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share (Wilson's score interval), which is not empty at 0 % and 100 %."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / samples
    centre = share + z**2 / (2 * samples)
    spread = z * (share * (1 - share) / samples + z**2 / (4 * samples**2)) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z**2 / samples) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def target_index(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the targets are read, and what is right there.

    Args:
        labels: (B, row length); the labels of a row are one stretch.
        count: the most labels a row has.

    Returns:
        Positions whose outputs predict the labels, (B, count), and these labels, ``IGNORED_LABEL`` after the last.
    """
    first = (labels != IGNORED_LABEL).int().argmax(1, keepdim=True)
    place = first + torch.arange(count, device=labels.device)
    inside = place.clamp(max=labels.shape[1] - 1)
    return (inside - 1).clamp(min=0), labels.gather(1, inside).masked_fill(place > inside, IGNORED_LABEL)


def predict_targets(model: PreTrainedModel, samples: Samples, count: int) -> tuple[Tensor, Tensor]:
    """Predicted and right target tokens, (B, count), from one forward pass that sees the right tokens before them.

    Greedy generation gives the whole target if and only if every one of these predictions is right. Logits are
    computed at the targets only. After the last token of a target ``IGNORED_LABEL`` is right.
    """
    # Padding comes after the row, so that causal attention needs no mask.
    hidden = model.get_decoder()(input_ids=samples.input_ids, use_cache=False).last_hidden_state
    index, labels = target_index(samples.labels, count)
    hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    return model.get_output_embeddings()(hidden).argmax(-1), labels


def right_targets(model: PreTrainedModel, samples: Samples, count: int) -> tuple[Tensor, Tensor]:
    """Right and counted target tokens, bool (B, count)."""
    predicted, labels = predict_targets(model, samples, count)
    counted = labels != IGNORED_LABEL
    return (predicted == labels) & counted, counted


def batches(task: Task, length: int | tuple[int, int], samples: int, seed: int, size: int) -> Iterator[Samples]:
    """The rows that a ladder measures, ``size`` at a time."""
    for number in range(-(-samples // BLOCK)):
        block = draw_block(task, length, seed, number)
        rows = min(BLOCK, samples - number * BLOCK)
        for start in range(0, rows, size):
            yield Samples(*(tensor[start : min(rows, start + size)] for tensor in block))


@torch.inference_mode()
def measure(model: PreTrainedModel, task: Task, length: int, options: LadderOptions) -> Cell:
    """Exact match at one length. The model is in eval mode; samples do not depend on device or batch size."""
    began = time.monotonic()
    samples = options.count(length)
    size = max(1, options.batch_tokens // task.row_length(length))
    exact = right_tokens = all_tokens = 0
    with _autocast(model, options):
        for batch in batches(task, length, samples, options.seed, size):
            batch = Samples(*(tensor.to(model.device) for tensor in batch))
            right, counted = right_targets(model, batch, task.label_tokens(length))
            exact += (right == counted).all(1).sum()
            right_tokens += right.sum()
            all_tokens += counted.sum()
        generated, generated_exact, agree = check_generation(model, task, length, options)
    exact, right_tokens, all_tokens = int(exact), int(right_tokens), int(all_tokens)
    low, high = wilson(exact, samples)
    return Cell(
        length=length,
        row_tokens=task.row_length(length),
        samples=samples,
        exact_match=exact / samples,
        low=low,
        high=high,
        token_accuracy=right_tokens / all_tokens,
        generated=generated,
        generated_exact=generated_exact,
        generated_agree=agree,
        seconds=round(time.monotonic() - began, 2),
    )


def _autocast(model: PreTrainedModel, options: LadderOptions) -> contextlib.AbstractContextManager:
    if options.dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=options.dtype)


@torch.inference_mode()
def check_generation(model: PreTrainedModel, task: Task, length: int, options: LadderOptions) -> tuple[int, int, int]:
    """Generate some targets greedily, in one batch of prompts of different lengths padded on the left.

    Returns:
        How many were generated (0 where the task has tags, or beyond the limits of the options), how many were right,
        and for how many :func:`right_targets` says the same.
    """
    count = task.label_tokens(length)
    too_long = count > options.generate_tokens or length > options.generate_length
    if task.tags or too_long or not options.generate:
        return 0, 0, 0
    rows = options.generate
    lengths = (max(task.min_length, length // 2), length)
    batch = Samples(*(t[:rows].to(model.device) for t in draw_block(task, lengths, options.seed + 1, 0)))
    right, counted = right_targets(model, batch, count)
    forced = (right == counted).all(1)
    prompts = [row[: int((mark != IGNORED_LABEL).int().argmax())] for row, mark in zip(*batch)]
    longest = max(map(len, prompts))
    padded = torch.full((len(prompts), longest), PAD, device=model.device)
    for row, prompt in zip(padded, prompts):
        row[longest - len(prompt) :] = prompt
    output = model.generate(
        input_ids=padded,
        attention_mask=(padded != PAD).long(),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )[:, longest:]
    _, labels = target_index(batch.labels, count)
    output = torch.nn.functional.pad(output, (0, count - output.shape[1]), value=PAD)
    generated = ((output == labels) | (labels == IGNORED_LABEL)).all(1)
    return len(prompts), int(generated.sum()), int((generated == forced).sum())


def run_ladder(
    model: PreTrainedModel,
    task: Task,
    lengths: Sequence[int],
    options: LadderOptions,
    progress: Callable[[Cell], None] = lambda cell: None,
) -> dict[str, Any]:
    """Exact match at ascending lengths, until nothing is right or the time is over.

    Returns:
        ``cells``, one dict per measured length, and ``not_measured`` with a reason (``nothing right`` or ``time``) for
        each length that was left out.
    """
    model.eval()
    began = time.monotonic()
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    reason = None
    for length in sorted(lengths):
        if reason is None and options.seconds is not None:
            spent = time.monotonic() - began
            reason = "time" if spent + _expected_seconds(cells, length, options) > options.seconds else None
        if reason is not None:
            left_out[str(length)] = reason
            continue
        cells.append(measure(model, task, length, options))
        progress(cells[-1])
        if cells[-1].exact_match == 0:
            reason = "nothing right"
    return {"cells": [asdict(cell) for cell in cells], "not_measured": left_out}


def _expected_seconds(cells: Sequence[Cell], length: int, options: LadderOptions) -> float:
    """From the cell before; the first two contain what is compiled."""
    if len(cells) < 3:
        return 0.0
    last = cells[-1]
    return last.seconds * (length / last.length) ** 1.5 * options.count(length) / last.samples
