"""The losses of pretrain.py: of a training step, with its gradients, and of validation rows."""

from __future__ import annotations

import contextlib
import math

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy, pad

from hf_sparse_attention.data import IGNORED_LABEL, count_labels, split_batches


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def forward_backward(
    accelerator: Accelerator, model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], labels: float
) -> torch.Tensor:
    """Gradients of the mean loss over the labels of the step, weighted if they are; returns it, on the device."""
    total = torch.zeros((), device=accelerator.device)
    # A tensor: compiled code would be compiled anew for another number.
    count = torch.tensor(labels).to(accelerator.device, non_blocking=True)
    for number, batch in enumerate(batches, start=1):
        with contextlib.nullcontext() if number == len(batches) else accelerator.no_sync(model):
            batch = to_device(batch, accelerator.device)
            if "label_weights" in batch:
                loss = weighted_loss(model, **batch) / count
            else:
                loss = model(**batch, use_cache=False, num_items_in_batch=count).loss
            # Gradients are averaged over processes, the loss is a sum over them.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return accelerator.reduce(total, "sum")


def weighted_loss(
    model: torch.nn.Module, *, labels: torch.Tensor, label_weights: torch.Tensor, **inputs: torch.Tensor
) -> torch.Tensor:
    """Sum of weight times loss over the labels; the losses of transformers have no argument for weights."""
    logits = model(**inputs, use_cache=False).logits.float().flatten(0, 1)
    # Labels are moved instead of logits, of which a part would be a copy.
    targets, weights = pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL), pad(label_weights[:, 1:], (0, 1))
    losses = cross_entropy(logits, targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return losses @ weights.flatten()


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, rows: list[dict[str, torch.Tensor]], size: int
) -> dict[str, float]:
    """Mean loss over the labels of the rows, and its perplexity."""
    labels = int(count_labels(rows))
    # Rows without labels fill up the last round: under FSDP all processes must take part in every forward pass.
    missing = -len(rows) % accelerator.num_processes
    blank = {**rows[0], "labels": torch.full_like(rows[0]["labels"], IGNORED_LABEL)}
    model.eval()
    total = torch.zeros((), device=accelerator.device)
    own = [*rows, *[blank] * missing][accelerator.process_index :: accelerator.num_processes]
    for batch in split_batches(own, size):
        batch = to_device(batch, accelerator.device)
        total += model(**batch, use_cache=False, num_items_in_batch=labels).loss
    model.train()
    loss = accelerator.reduce(total, "sum").item()
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "eval_labels": labels}
