"""Tasks with a label for each token of the source, read at that token: local count and n-back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import FIRST_SYMBOL, Drawn, Task, check_count, symbols


@dataclass(frozen=True)
class LocalCount(Task):
    """Runs of equal symbols; the label of a token says how many tokens of its run stand before it.

    Args:
        alphabet: symbols; neighbouring runs have different ones.
        max_repeats: runs have 2 to so many tokens, equally likely; the last may be cut by the end of the row.
    """

    name: ClassVar[str] = "local_count"
    tags: ClassVar[bool] = True
    train_lengths: ClassVar[tuple[int, int]] = (64, 128)
    alphabet: int = 16
    max_repeats: int = 48

    def __post_init__(self) -> None:
        check_count("alphabet", self.alphabet, 2)
        check_count("max_repeats", self.max_repeats, 2)

    @property
    def first_count(self) -> int:
        """Token id of the count 0."""
        return FIRST_SYMBOL + self.alphabet

    @property
    def vocab_size(self) -> int:
        return self.first_count + self.max_repeats

    def draw(self, lengths: Tensor, limit: int, generator: torch.Generator | None) -> Drawn:
        batch, device = lengths.shape[0], lengths.device
        shape = (batch, limit // 2 + 1)
        repeats = torch.randint(2, self.max_repeats + 1, shape, generator=generator, device=device)
        ends = repeats.cumsum(1)
        # A step of at least 1 around the alphabet is another symbol.
        steps = torch.randint(1, self.alphabet, shape, generator=generator, device=device)
        first = torch.randint(0, self.alphabet, (batch, 1), generator=generator, device=device)
        of_run = (first + steps.cumsum(1)) % self.alphabet + FIRST_SYMBOL
        index = torch.arange(limit, device=device).expand(batch, -1).contiguous()
        run = torch.searchsorted(ends, index, right=True).clamp(max=shape[1] - 1)
        count = index - (ends - repeats).gather(1, run)
        return Drawn(of_run.gather(1, run), count + self.first_count, lengths, lengths)


@dataclass(frozen=True)
class NBack(Task):
    """The label of a token is the token ``steps`` before it, and a symbol of its own where there is none.

    Args:
        alphabet: symbols, that one included.
        steps: how far back.
    """

    name: ClassVar[str] = "n_back"
    tags: ClassVar[bool] = True
    alphabet: int = 16
    steps: int = 2

    def __post_init__(self) -> None:
        check_count("alphabet", self.alphabet, 3)
        check_count("steps", self.steps, 1)

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.alphabet

    def draw(self, lengths: Tensor, limit: int, generator: torch.Generator | None) -> Drawn:
        source = symbols(self.alphabet - 1, (lengths.shape[0], limit), generator, lengths.device) + 1
        earlier = torch.nn.functional.pad(source, (self.steps, 0), value=FIRST_SYMBOL)[:, :limit]
        return Drawn(source, earlier, lengths, lengths)
