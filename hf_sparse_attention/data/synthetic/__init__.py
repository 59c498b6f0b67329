"""The paper's synthetic tasks (arXiv 2506.16640): samples of any length, drawn on any device, without files.

task = make_task("mqmtar")
batch = task.sample(128, (32, 64), torch.Generator("cuda").manual_seed(0))
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from .base import BOS, EOS, IGNORED_LABEL, PAD, SEP, Samples, Task
from .datasets import iterable_dataset, map_dataset, write_parquet
from .recall import Recall
from .sequences import Copy, FlipFlop, MaxRetrieval, Parity, Reverse, Sort
from .tagging import LocalCount, NBack

TASKS: dict[str, type[Task]] = {
    kind.name: kind for kind in (Recall, Copy, Reverse, Sort, LocalCount, NBack, FlipFlop, Parity, MaxRetrieval)
}

__all__ = [
    "BOS",
    "EOS",
    "IGNORED_LABEL",
    "PAD",
    "SEP",
    "TASKS",
    "Samples",
    "Task",
    "iterable_dataset",
    "make_task",
    "map_dataset",
    "write_parquet",
]


def make_task(name: str, **options: Any) -> Task:
    """The task ``name`` with the options of its class, e.g. ``make_task("sort", alphabet=64)``.

    Raises:
        ValueError: there is no such task or option, or its value is not allowed.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; allowed: {', '.join(TASKS)}.")
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"the task {name} has no option {option!r}; allowed: {', '.join(known) or 'none'}.{hint}")
    return TASKS[name](**options)
