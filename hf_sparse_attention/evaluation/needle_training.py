"""Needle rows to train on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from ..data import IGNORED_LABEL
from .needle_tasks import NeedleFormat, NeedleSource


def make_training_rows(
    tokenizer: PreTrainedTokenizerBase,
    essay_text: str | None,
    *,
    length: int,
    tasks: Sequence[str] = ("s_niah_1", "s_niah_2"),
    format: NeedleFormat | None = None,
    seed: int = 0,
    start: int = 0,
    answer_only: bool = True,
    bos: bool | None = None,
    questions: int = 1,
) -> Iterator[dict[str, list[int]]]:
    """Endless retrieval rows to mix into pretraining: a base model answers needle prompts only after having seen some.

    Row ``i`` depends on the arguments and ``i`` alone, so a resumed run continues with ``start=rows already used``.
    Keys come from another split than those of the evaluation samples; give the training text as ``essay_text``.

    Args:
        tokenizer, essay_text, format, bos: as for ``NeedleSource``. Small byte-level models:
            ``NeedleFormat("short", number_digits=4, uuid_characters=8)``.
        length: tokens of every row, at most the training length; each row is one document without padding.
        tasks: drawn uniformly per row; the depth is uniform in [0, 1].
        seed, start: which stream, and its first row.
        answer_only: labels are -100 everywhere but on the answer; otherwise the labels are the input ids.
        questions: with more than 1, rows of :meth:`NeedleSource.questions_row`.

    Yields:
        ``{"input_ids": [length ints], "labels": [length ints]}``; labels are not shifted (the model does that).

    Raises:
        ValueError: unknown task, or ``length`` too short for one of the tasks.
    """
    source = NeedleSource(tokenizer, essay_text, format, bos)
    index = start
    while True:
        rng = random.Random(f"row/{seed}/{index}")
        task = rng.choice(list(tasks))
        if questions > 1:
            ids, is_answer = source.questions_row(task, length, questions, seed, index)
        else:
            sample = source.sample(task, length, rng.random(), seed, index, split="train")
            ids = [*sample.prompt_ids, *sample.answer_ids]
            is_answer = [False] * len(sample.prompt_ids) + [True] * len(sample.answer_ids)
        kept = (answer or not answer_only for answer in is_answer)
        yield {"input_ids": ids, "labels": [token if keep else IGNORED_LABEL for token, keep in zip(ids, kept)]}
        index += 1
