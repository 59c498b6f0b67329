"""Whether a model that copies or reverses errs where what it reads stands in a row more than once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.synthetic import IGNORED_LABEL, Task
from .synthetic import batches, predict_targets


@dataclass
class ContextCount:
    """Target tokens of one ambiguity: so many symbols before them also stand before another symbol of the target.

    Attributes:
        tokens: how many there are.
        wrong: of them predicted wrongly.
        followed: of the wrong, with a symbol that has as many of the same symbols before it elsewhere in the target.
    """

    tokens: int = 0
    wrong: int = 0
    followed: int = 0


def common_contexts(target: Tensor) -> Tensor:
    """How many symbols before place i are those before place j, for a target (L,): int (L, L)."""
    same = target[:, None] == target[None, :]
    contexts = torch.zeros(same.shape, dtype=torch.int32)
    for place in range(1, len(target)):
        contexts[place, 1:] = (contexts[place - 1, :-1] + 1) * same[place - 1, :-1]
    return contexts


def count_contexts(target: Tensor, predicted: Tensor, counts: dict[int, ContextCount]) -> None:
    """Add the tokens of one target (L,) to the counts by ambiguity."""
    contexts = common_contexts(target)
    other = target[None, :] != target[:, None]
    ambiguity = torch.where(other, contexts, -1).amax(1)
    # A symbol that occurs nowhere follows no context.
    followed = torch.where(target[None, :] == predicted[:, None], contexts, -1).amax(1)
    for place in range(len(target)):
        count = counts.setdefault(max(0, int(ambiguity[place])), ContextCount())
        wrong = bool(predicted[place] != target[place])
        count.tokens += 1
        count.wrong += wrong
        count.followed += wrong and bool(followed[place] == ambiguity[place])


@torch.inference_mode()
def errors_by_context(
    model: PreTrainedModel, task: Task, length: int, samples: int, seed: int = 1, batch_tokens: int = 16384
) -> tuple[dict[int, ContextCount], int]:
    """Counts by ambiguity, ascending, over rows of one length, and how many rows are right in every token.

    Args:
        samples: rows, those that a ladder with this seed measures.
        batch_tokens: about how many tokens go through the model at once.
    """
    counts: dict[int, ContextCount] = {}
    right = 0
    size = max(1, batch_tokens // task.row_length(length))
    for batch in batches(task, length, samples, seed, size):
        moved = type(batch)(*(tensor.to(model.device) for tensor in batch))
        predicted, labels = (t.cpu() for t in predict_targets(model, moved, task.label_tokens(length)))
        for row, target in zip(predicted, labels):
            inside = target != IGNORED_LABEL
            count_contexts(target[inside], row[inside], counts)
            right += bool((row == target)[inside].all())
    return dict(sorted(counts.items())), right
