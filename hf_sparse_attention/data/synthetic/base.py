"""What the synthetic tasks share: special tokens, layout of a row, sampling."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

PAD, BOS, EOS, SEP = range(4)
FIRST_SYMBOL = 4
IGNORED_LABEL = -100


class Samples(NamedTuple):
    """A batch, padded on the right: int64 (B, row length), labels ``IGNORED_LABEL`` outside the target.

    ``labels[:, i]`` is predicted from the tokens before position i, as causal language models of transformers do it.
    """

    input_ids: Tensor
    labels: Tensor


class Drawn(NamedTuple):
    """What a task draws: token ids (B, limit of source), (B, limit of target) and how many of them each row has."""

    source: Tensor
    target: Tensor
    source_lengths: Tensor
    target_lengths: Tensor


@dataclass(frozen=True)
class Task(ABC):
    """A family of samples of any length. Fields of the subclasses are its options.

    All tensors are made on the device of the lengths, with static shapes and without reading a value back, so that
    sampling can be captured in a CUDA graph.

    Attributes:
        name: how the recipe calls it.
        separator: whether a separator stands between source and target.
        tags: whether the target has one label for each token of the source, read at that token, instead of being
            written after it.
        train_lengths: shortest and longest source of the paper's training rows.
        min_length: the shortest source that makes sense.
    """

    name: ClassVar[str]
    separator: ClassVar[bool] = True
    tags: ClassVar[bool] = False
    train_lengths: ClassVar[tuple[int, int]] = (32, 64)
    min_length: ClassVar[int] = 1

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many token ids there are, special ones included."""

    def source_tokens(self, length: int) -> int:
        """Tokens of the longest source for ``length``."""
        return length

    def target_tokens(self, length: int) -> int:
        """Tokens of the longest target for ``length``, without the end-of-sequence token."""
        return length

    @abstractmethod
    def draw(self, lengths: Tensor, limit: int, generator: torch.Generator | None) -> Drawn:
        """Sources and targets of ``lengths`` (B,), none above ``limit``."""

    def row_length(self, length: int) -> int:
        """Tokens of the longest row for ``length``: with special tokens, and the target unless it is of tags."""
        if self.tags:
            return self.source_tokens(length) + 2
        return self.source_tokens(length) + self.target_tokens(length) + 2 + self.separator

    def label_tokens(self, length: int) -> int:
        """The most labels a row of ``length`` has: one stretch, the end-of-sequence token included."""
        return self.target_tokens(length) + (not self.tags)

    def sample(
        self,
        batch: int,
        length: int | tuple[int, int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Samples:
        """Draw ``batch`` rows.

        Args:
            length: of the source, or shortest and longest, each equally likely.
            generator: default: the device's own.
            device: default: that of the generator.

        Raises:
            ValueError: a length is below :attr:`min_length`, or the shortest above the longest.
        """
        low, high = (length, length) if isinstance(length, int) else length
        self.check_length(low)
        if low > high:
            raise ValueError(f"length is {low} to {high}; allowed: the shorter first.")
        device = device or (generator.device if generator else "cpu")
        lengths = torch.randint(low, high + 1, (batch,), generator=generator, device=device)
        return self.sample_lengths(lengths, high, generator)

    def sample_lengths(self, lengths: Tensor, limit: int, generator: torch.Generator | None = None) -> Samples:
        """Draw one row for each of ``lengths`` (B,), none above ``limit``; rows have ``row_length(limit)`` tokens."""
        drawn = self.draw(lengths, limit, generator)
        size = drawn.source_lengths[:, None]
        position = torch.arange(self.row_length(limit), device=lengths.device)[None]
        row = _take(drawn.source, position - 1).masked_fill(position == 0, BOS).masked_fill(position > size, PAD)
        if self.tags:
            row = row.masked_fill(position == size + 1, EOS)
            is_label = (position >= 2) & (position <= size + 1)
            return Samples(row, _take(drawn.target, position - 2).masked_fill(~is_label, IGNORED_LABEL))
        first = size + 1 + self.separator
        if self.separator:
            row = row.masked_fill(position == size + 1, SEP)
        last = first + drawn.target_lengths[:, None]
        row = torch.where((position >= first) & (position < last), _take(drawn.target, position - first), row)
        row = row.masked_fill(position == last, EOS)
        return Samples(row, row.masked_fill((position < first) | (position > last), IGNORED_LABEL))

    def check_length(self, length: int) -> None:
        if isinstance(length, bool) or not isinstance(length, int) or length < self.min_length:
            raise ValueError(
                f"length is {length!r}; allowed for {self.name}: an integer of at least {self.min_length}."
            )


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """``tokens[b, index[b, i]]`` with indices outside moved to the nearest inside; (B, rows of index)."""
    index = index.clamp(0, tokens.shape[1] - 1)
    return tokens.gather(1, index.expand(tokens.shape[0], -1))


def uniform_below(high: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Integers from 0 to ``high - 1``, where ``high`` (broadcastable to ``shape``, below 2^24) is on the device."""
    draws = torch.rand(shape, generator=generator, device=high.device)
    return torch.minimum((draws * high).long(), high - 1)


def symbols(count: int, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Token ids of ``count`` symbols, equally likely."""
    return torch.randint(FIRST_SYMBOL, FIRST_SYMBOL + count, shape, generator=generator, device=device)


def check_count(name: str, value: int, least: int) -> None:
    """Raise ValueError unless the option ``name`` of a task is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed: an integer of at least {least}.")


def check_choices(name: str, given: Sequence[int] | None, least: int, most: int) -> tuple[int, ...] | None:
    """The option ``name`` of a task as a tuple.

    Raises:
        ValueError: it is neither None nor integers from ``least`` to ``most``.
    """
    if given is None:
        return None
    wrong = isinstance(given, str) or not isinstance(given, Sequence) or not given
    if wrong or not all(type(number) is int and least <= number <= most for number in given):
        raise ValueError(f"{name} is {given!r}; allowed: None, or integers from {least} to {most}, the alphabet.")
    return tuple(given)


def choose_symbols(
    choices: tuple[int, ...], count: int, rows: int, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each row how many different symbols it has, (rows, 1), and all ``count`` symbols in random order.

    The number is one of ``choices``, each equally likely; the row's symbols are the first so many of its order, given
    as token ids (rows, count).
    """
    which = torch.randint(len(choices), (rows,), generator=generator, device=device)
    order = torch.rand(rows, count, generator=generator, device=device).argsort(dim=1)
    return _on_device(choices, device)[which, None], order + FIRST_SYMBOL


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, because a captured graph cannot copy from the host.
    return torch.tensor(numbers, device=device)
