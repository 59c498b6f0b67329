"""Tasks that write a target after the source: copy, reverse, sort, parity, flip-flop, max retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import (
    FIRST_SYMBOL,
    Drawn,
    Task,
    check_choices,
    check_count,
    choose_symbols,
    symbols,
    uniform_below,
)


@dataclass(frozen=True)
class Copy(Task):
    """The source again.

    Args:
        alphabet: symbols, equally likely and independent.
        row_symbols: how many of them a row is made of, each of these numbers equally likely; None: all. Rows of few
            symbols repeat themselves as often as long rows of many do.
    """

    name: ClassVar[str] = "copy"
    alphabet: int = 32
    row_symbols: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_count("alphabet", self.alphabet, 2)
        object.__setattr__(self, "row_symbols", check_choices("row_symbols", self.row_symbols, 2, self.alphabet))

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.alphabet

    def draw(self, lengths: Tensor, limit: int, generator: torch.Generator | None) -> Drawn:
        shape = (lengths.shape[0], limit)
        if self.row_symbols is None:
            source = symbols(self.alphabet, shape, generator, lengths.device)
        else:
            number, chosen = choose_symbols(self.row_symbols, self.alphabet, shape[0], generator, lengths.device)
            source = chosen.gather(1, uniform_below(number, shape, generator))
        return Drawn(source, self._answer(source, lengths), lengths, lengths)

    def _answer(self, source: Tensor, lengths: Tensor) -> Tensor:
        return source


@dataclass(frozen=True)
class Reverse(Copy):
    """The source from its end to its start."""

    name: ClassVar[str] = "reverse"

    def _answer(self, source: Tensor, lengths: Tensor) -> Tensor:
        index = lengths[:, None] - 1 - torch.arange(source.shape[1], device=source.device)
        return source.gather(1, index.clamp(min=0))


@dataclass(frozen=True)
class Sort(Copy):
    """The source in ascending order; symbols occur again and again."""

    name: ClassVar[str] = "sort"

    def _answer(self, source: Tensor, lengths: Tensor) -> Tensor:
        index = torch.arange(source.shape[1], device=source.device)
        # Symbols after the end of a row sort behind its own.
        beyond = source.masked_fill(index >= lengths[:, None], self.vocab_size)
        return beyond.sort(dim=1).values


@dataclass(frozen=True)
class Parity(Task):
    """One symbol after a row of two symbols: the second if it occurs an odd number of times."""

    name: ClassVar[str] = "parity"

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + 2

    def target_tokens(self, length: int) -> int:
        return 1

    def draw(self, lengths: Tensor, limit: int, generator: torch.Generator | None) -> Drawn:
        source = symbols(2, (lengths.shape[0], limit), generator, lengths.device)
        inside = torch.arange(limit, device=lengths.device) < lengths[:, None]
        odd = ((source - FIRST_SYMBOL) * inside).sum(1, keepdim=True) % 2
        return Drawn(source, odd + FIRST_SYMBOL, lengths, torch.ones_like(lengths))


@dataclass(frozen=True)
class FlipFlop(Task):
    """Commands, each followed by a bit; the last command asks for the bit after the last ``write``.

    The first command is ``write`` and the last ``read``; between them ``write`` or ``ignore``. A source of length n
    has n // 2 commands, and no separator: the bit follows the read command.

    Args:
        write_probability: of a command between the first and the last.
    """

    name: ClassVar[str] = "flip_flop"
    separator: ClassVar[bool] = False
    min_length: ClassVar[int] = 4
    write_probability: float = 0.1

    ZERO: ClassVar[int] = FIRST_SYMBOL
    WRITE: ClassVar[int] = FIRST_SYMBOL + 2
    IGNORE: ClassVar[int] = FIRST_SYMBOL + 3
    READ: ClassVar[int] = FIRST_SYMBOL + 4

    def __post_init__(self) -> None:
        if not 0 < self.write_probability < 1:
            raise ValueError(f"write_probability is {self.write_probability!r}; allowed: between 0 and 1.")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + 5

    def source_tokens(self, length: int) -> int:
        return length // 2 * 2 - 1

    def target_tokens(self, length: int) -> int:
        return 1

    def draw(self, lengths: Tensor, limit: int, generator: torch.Generator | None) -> Drawn:
        shape = (lengths.shape[0], limit // 2)
        count = (lengths // 2)[:, None]
        index = torch.arange(shape[1], device=lengths.device)[None]
        bits = symbols(2, shape, generator, lengths.device)
        writes = torch.rand(shape, generator=generator, device=lengths.device) < self.write_probability
        writes = (writes | (index == 0)) & (index < count - 1)
        commands = (self.IGNORE + (self.WRITE - self.IGNORE) * writes).masked_fill(index == count - 1, self.READ)
        last = (index * writes).amax(1, keepdim=True)
        source = torch.stack((commands, bits), dim=2).flatten(1)
        return Drawn(source[:, :-1], bits.gather(1, last), 2 * count[:, 0] - 1, torch.ones_like(lengths))


@dataclass(frozen=True)
class MaxRetrieval(Task):
    """Items, each a class and a priority; the target is the class of the one item with the highest priority.

    A source of length n has n // 2 items. The highest priority is drawn first, equally likely among all above the
    lowest, then the others below it, so that there is one winner at any length.

    Args:
        classes: how many classes there are.
        priorities: how many priorities there are.
    """

    name: ClassVar[str] = "max_retrieval"
    min_length: ClassVar[int] = 2
    classes: int = 16
    priorities: int = 64

    def __post_init__(self) -> None:
        check_count("classes", self.classes, 2)
        check_count("priorities", self.priorities, 2)

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.classes + self.priorities

    def source_tokens(self, length: int) -> int:
        return length // 2 * 2

    def target_tokens(self, length: int) -> int:
        return 1

    def draw(self, lengths: Tensor, limit: int, generator: torch.Generator | None) -> Drawn:
        batch, items = lengths.shape[0], limit // 2
        count = (lengths // 2)[:, None]
        highest = torch.randint(1, self.priorities, (batch, 1), generator=generator, device=lengths.device)
        winner = uniform_below(count, (batch, 1), generator)
        priorities = uniform_below(highest, (batch, items), generator)
        index = torch.arange(items, device=lengths.device)[None]
        priorities = torch.where(index == winner, highest, priorities) + FIRST_SYMBOL + self.classes
        classes = symbols(self.classes, (batch, items), generator, lengths.device)
        source = torch.stack((classes, priorities), dim=2).flatten(1)
        return Drawn(source, classes.gather(1, winner), 2 * count[:, 0], torch.ones_like(lengths))
