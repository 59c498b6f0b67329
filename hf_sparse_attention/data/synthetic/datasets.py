"""Synthetic tasks as data sets: in memory, streaming, or written to parquet, with the same samples in each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base import PAD, Samples, Task

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Samples are drawn so many at a time; a block depends on the seed and its number alone.
BLOCK = 64


def map_dataset(task: Task, length: int | tuple[int, int], samples: int, seed: int = 0) -> Dataset:
    """``samples`` rows in memory with the columns ``input_ids`` and ``labels``, without padding.

    Args:
        length: of the source, or shortest and longest, each equally likely.
    """
    from datasets import Dataset

    return Dataset.from_list(list(_rows(task, length, seed, samples)), features=_features())


def iterable_dataset(
    task: Task, length: int | tuple[int, int], samples: int | None = None, seed: int = 0
) -> IterableDataset:
    """The rows of :func:`map_dataset`, drawn as they are read; without ``samples`` they never end.

    With ``samples`` there is a shard per block of 64 rows, for data loaders of several workers and
    ``split_dataset_by_node``.
    """
    from datasets import IterableDataset

    _check(task, length, samples)
    fixed = {"task": task, "length": length, "seed": seed, "samples": samples}
    if samples is not None:
        # A list is what is divided between workers.
        fixed["blocks"] = list(range(-(-samples // BLOCK)))
    return IterableDataset.from_generator(_shard, gen_kwargs=fixed, features=_features())


def write_parquet(task: Task, length: int | tuple[int, int], samples: int, path: str | Path, seed: int = 0) -> Path:
    """Write the rows of :func:`map_dataset` to a file that ``load_dataset("parquet", data_files=...)`` reads."""
    import pyarrow
    from pyarrow import parquet

    _check(task, length, samples)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int64())) for name in _features()])
    with parquet.ParquetWriter(path, schema) as writer:
        rows = _rows(task, length, seed, samples)
        while part := list(itertools.islice(rows, 16 * BLOCK)):
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))
    return path


def _features() -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})


def _rows(task: Task, length: int | tuple[int, int], seed: int, samples: int | None) -> Iterator[dict[str, list[int]]]:
    _check(task, length, samples)
    numbers = itertools.count() if samples is None else range(-(-samples // BLOCK))
    return _shard(task, length, seed, samples, numbers)


def _shard(
    task: Task, length: int | tuple[int, int], seed: int, samples: int | None, blocks: Any = None
) -> Iterator[dict[str, list[int]]]:
    """The rows of some blocks."""
    for number in itertools.count() if blocks is None else blocks:
        size = BLOCK if samples is None else min(BLOCK, samples - number * BLOCK)
        batch = draw_block(task, tuple(length) if isinstance(length, list) else length, seed, number)
        used = (batch.input_ids != PAD).sum(1).tolist()
        for row in range(size):
            yield {
                "input_ids": batch.input_ids[row, : used[row]].tolist(),
                "labels": batch.labels[row, : used[row]].tolist(),
            }


def draw_block(task: Task, length: int | tuple[int, int], seed: int, number: int) -> Samples:
    """Rows ``64 * number`` to ``64 * number + 63`` of every data set with this seed, padded, on the CPU."""
    # Neighbouring seeds and blocks must not share a stream.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + number * 0x85EBCA77 + 1) % 2**63)
    return task.sample(BLOCK, length, generator)


def _check(task: Task, length: int | tuple[int, int], samples: int | None) -> None:
    low, high = (length, length) if isinstance(length, int) else length
    task.check_length(low)
    if low > high:
        raise ValueError(f"length is {low} to {high}; allowed: the shorter first.")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ValueError(f"samples is {samples!r}; allowed: an integer of at least 1, or None.")
