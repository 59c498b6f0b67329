"""The rows of each optimizer step, made by a thread while the steps before are computed."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .packing import IGNORED_LABEL, MixedRows, PackedRows, Row, collate_rows

_STEPS_AHEAD = 3


@dataclass(frozen=True)
class StepRows:
    """One process's share of the rows of a step.

    Attributes:
        batches: tensors (rows, length) on the CPU, of at most ``device_batch_size`` rows each.
        labels: how many labels all rows of the step have, over all processes; the sum of their weights where rows have
            ``label_weights``.
        position: of the data after this step; continuing from it gives the next one.
    """

    batches: list[Row]
    labels: float
    position: dict[str, Any]


def step_rows(
    rows: PackedRows | MixedRows,
    batch_size: int,
    device_batch_size: int,
    *,
    process: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> Iterator[StepRows]:
    """Steps of ``batch_size`` rows without end, the next ones made in a thread.

    Every process reads all rows of a step and keeps its share: the same rows on any number of processes. Close the
    iterator to stop the thread; ``rows`` is ahead of what was taken, so save :attr:`StepRows.position` instead.

    Args:
        rows: gives the rows, from its position on.
        batch_size: rows of a step, over all processes.
        device_batch_size: rows of a batch.
        process, processes: which share.
        pin_memory: batches in pinned memory, from which copies to a GPU need not be waited for.
    """
    source = iter(rows)

    def make() -> StepRows:
        taken = list(itertools.islice(source, batch_size))
        own = list(split_batches(taken[process::processes], device_batch_size))
        if pin_memory:
            own = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in own]
        return StepRows(own, count_labels(taken), rows.state_dict())

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows") as executor:
        upcoming = deque(executor.submit(make) for _ in range(_STEPS_AHEAD))
        try:
            while True:
                step = upcoming.popleft().result()
                upcoming.append(executor.submit(make))
                yield step
        finally:
            for future in upcoming:
                future.cancel()


def split_batches(rows: Sequence[Row], size: int) -> Iterator[Row]:
    """Batches of at most ``size`` rows."""
    for start in range(0, len(rows), size):
        yield collate_rows(rows[start : start + size])


def count_labels(rows: Sequence[Row]) -> float:
    """Labels that the rows are trained on, or the sum of their ``label_weights``; 1 if there are none.

    The first token of a row is predicted by nothing.
    """
    batch = collate_rows(rows)
    counted = (batch["labels"] != IGNORED_LABEL)[:, 1:]
    if "label_weights" in batch:
        counted = counted * batch["label_weights"][:, 1:].double()
    return float(counted.sum()) or 1.0
