"""Answers of retrieval rows may count more than text."""

import pretrain as recipe
import pytest
import torch
from accelerate import Accelerator
from tiny_run import forget_accelerate
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse_attention.data import IGNORED_LABEL, count_labels, split_batches

WEIGHT = 5.0


def rows(weight=WEIGHT):
    """Two rows of text and one with three answers."""
    ids = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))
    labels, weights = ids.clone(), torch.ones(3, 17)
    labels[1, :14] = IGNORED_LABEL
    weights[1] = weight
    return [dict(zip(("input_ids", "labels", "label_weights"), columns)) for columns in zip(ids, labels, weights)]


def test_labels_that_count_little_are_not_taken_for_one():
    assert count_labels(rows(weight=0.125)[1:2]) == 3 * 0.125
    blank = {**rows()[0], "labels": torch.full((17,), IGNORED_LABEL)}
    assert count_labels([blank]) == 1


def test_gradients_are_those_of_the_weighted_mean():
    forget_accelerate()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    sums, expected = 0.0, [torch.zeros_like(parameter) for parameter in model.parameters()]
    for row, weight, labels in zip(rows(), (1, WEIGHT, 1), (16, 3, 16)):
        loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss * weight * labels
        sums += loss.item()
        for total, gradient in zip(expected, torch.autograd.grad(loss, list(model.parameters()))):
            total += gradient
    count = count_labels(rows())
    assert count == 32 + 3 * WEIGHT

    found = recipe.forward_backward(Accelerator(cpu=True), model, list(split_batches(rows(), 2)), count)
    assert found.item() == pytest.approx(sums / count, rel=1e-5)
    for total, parameter in zip(expected, model.parameters()):
        torch.testing.assert_close(parameter.grad, total / count, rtol=1e-4, atol=1e-6)
