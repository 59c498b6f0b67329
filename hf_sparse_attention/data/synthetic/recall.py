"""Multi-query multi-token associative recall."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import FIRST_SYMBOL, Drawn, Task, check_choices, check_count, choose_symbols, uniform_below

GAPS = ("slots", "anywhere")
# Chance that some row of a batch is left with a word drawn twice.
_REPEAT_CHANCE = 1e-12


@dataclass(frozen=True)
class Recall(Task):
    """Keys and values among blanks, then some of the keys again; the target has their values.

    The source is ``key SEP value blank`` for each pair, with further blanks, up to its length, and then ``ASK key``
    for each query; the target ``ASK value`` for each query. Keys and values are words of several symbols from two
    pools. No key or value occurs twice in a row, but a query may. The length of a source is that before the queries.

    Args:
        alphabet: symbols.
        key_tokens, value_tokens: symbols of a key and of a value.
        words: keys, and as many values, in the pools.
        queries: how many keys are asked for: a number, or the fewest and the most, each number equally likely.
        density: share of the length that pairs take, each counted with its separator and one blank: a number, or
            the least and the most; every number of pairs between them is equally likely.
        gaps: where further blanks are. slots: each pair is somewhere in its own equal share of the length;
            anywhere: blanks between two pairs vary from none to all there are.
        pool_seed: of the words in the pools.
        key_symbols: from how many symbols the keys of a row are made, each of these numbers equally likely; None: all.
            Keys of fewer than the alphabet are not from the pool. Few symbols make short rows as hard as long ones,
            where a key shares its first or last symbol with many others.
        value_symbols: the same for values, for each of their places on its own. They are then not from the pool, and
            may occur twice in a row.
    """

    name: ClassVar[str] = "mqmtar"
    alphabet: int = 256
    key_tokens: int = 2
    value_tokens: int = 2
    words: int = 10_000
    queries: int | Sequence[int] = 4
    density: float | Sequence[float] = 0.8
    gaps: str = "slots"
    pool_seed: int = 0
    key_symbols: Sequence[int] | None = None
    value_symbols: Sequence[int] | None = None

    BLANK: ClassVar[int] = FIRST_SYMBOL
    PAIR: ClassVar[int] = FIRST_SYMBOL + 1
    ASK: ClassVar[int] = FIRST_SYMBOL + 2
    FIRST: ClassVar[int] = FIRST_SYMBOL + 3
    min_length: ClassVar[int] = 6

    def __post_init__(self) -> None:
        for name in ("key_tokens", "value_tokens", "words"):
            check_count(name, getattr(self, name), 1)
        if isinstance(self.queries, Sequence) and not isinstance(self.queries, str):
            object.__setattr__(self, "queries", tuple(self.queries))
            if len(self.queries) != 2 or list(self.queries) != sorted(self.queries):
                raise ValueError(f"queries is {self.queries}; allowed: a number, or the fewest and the most.")
        for number in self._queries:
            check_count("queries", number, 1)
        check_count("alphabet", self.alphabet, 2)
        most = self.alphabet ** min(self.key_tokens, self.value_tokens)
        if self.words > most:
            raise ValueError(f"words is {self.words}; allowed: at most {most}, all words of the alphabet.")
        given = (self.density, self.density) if isinstance(self.density, (int, float)) else tuple(self.density)
        if len(given) != 2 or not 0 < given[0] <= given[1] <= 1:
            raise ValueError(f"density is {self.density!r}; allowed: a share above 0 and up to 1, or two of them.")
        object.__setattr__(self, "density", given)
        for name, least in (("key_symbols", 2), ("value_symbols", 1)):
            object.__setattr__(self, name, check_choices(name, getattr(self, name), least, self.alphabet))
        if self.gaps not in GAPS:
            raise ValueError(f"gaps is {self.gaps!r}; allowed: {', '.join(GAPS)}.")

    @property
    def vocab_size(self) -> int:
        return self.FIRST + self.alphabet

    @property
    def _queries(self) -> tuple[int, int]:
        return self.queries if isinstance(self.queries, tuple) else (self.queries, self.queries)

    @property
    def pair_span(self) -> int:
        """Tokens of a pair with its separator and one blank."""
        return self.key_tokens + self.value_tokens + 2

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if length < self.pair_span:
            raise ValueError(f"length is {length}; allowed: at least the {self.pair_span} tokens of a pair.")

    def max_pairs(self, length: int) -> int:
        return min(self.words, max(1, int(self.density[1] * length / self.pair_span + 1e-6)))

    def source_tokens(self, length: int) -> int:
        return length + self._queries[1] * (1 + self.key_tokens)

    def target_tokens(self, length: int) -> int:
        return self._queries[1] * (1 + self.value_tokens)

    def draw(self, lengths: Tensor, limit: int, generator: torch.Generator | None) -> Drawn:
        batch, device, pairs = lengths.shape[0], lengths.device, self.max_pairs(limit)
        # Float32 holds lengths and shares well enough for the small offset to undo its rounding.
        least, most = ((share * lengths / self.pair_span + 1e-4).long().clamp(1, pairs) for share in self.density)
        count = (least + uniform_below(most - least + 1, (batch,), generator))[:, None]
        keys, values = self._keys(pairs, batch, generator, device), self._values(pairs, batch, generator, device)
        mark = torch.full((batch, pairs, 1), self.PAIR, device=device)

        width = self.source_tokens(limit)
        start = self._starts(lengths[:, None], count, pairs, generator)
        is_pair = torch.arange(pairs, device=device) < count
        # Pairs that a row does not have go to a column that is cut off.
        place = start[..., None] + torch.arange(self.pair_span - 1, device=device)
        place = place.masked_fill(~is_pair[..., None], width)
        source = torch.full((batch, width + 1), self.BLANK, device=device)
        source.scatter_(1, place.flatten(1), torch.cat((keys, mark, values), dim=2).flatten(1))

        fewest, queries = self._queries
        asked = uniform_below(count, (batch, queries), generator)
        ask = torch.full((batch, queries, 1), self.ASK, device=device)
        question = torch.cat((ask, _choose(keys, asked)), dim=2).flatten(1)
        source.scatter_(1, lengths[:, None] + torch.arange(question.shape[1], device=device), question)
        target = torch.cat((ask, _choose(values, asked)), dim=2).flatten(1)
        number = torch.full_like(lengths, queries)
        if fewest < queries:
            number = fewest + uniform_below(number - fewest + 1, (batch,), generator)
        # Questions and answers beyond a row's own number lie outside these lengths.
        sizes = lengths + number * (1 + self.key_tokens), number * (1 + self.value_tokens)
        return Drawn(source[:, :-1], target, *sizes)

    def _pools(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _pools(self.alphabet, self.key_tokens, self.value_tokens, self.words, self.pool_seed, device)

    def _keys(self, pairs: int, batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Different keys in each row, (B, pairs, tokens)."""
        tokens = self.key_tokens
        words = self._pools(device)[0][distinct(pairs, self.words, batch, generator, device)]
        few = tuple(number for number in self.key_symbols or () if number < self.alphabet)
        if not few:
            return words
        if pairs > min(few) ** tokens:
            raise ValueError(
                f"key_symbols is {self.key_symbols}; allowed: numbers that make at least {pairs} words of {tokens} "
                "symbols, as many as a row may have pairs."
            )
        number, order = choose_symbols(self.key_symbols, self.alphabet, batch, generator, device)
        # Of all words of a row's symbols, numbered, the first of a random order.
        width = max(few) ** tokens
        noise = torch.rand(batch, width, generator=generator, device=device)
        code = noise.masked_fill(torch.arange(width, device=device) >= number**tokens, 2.0).argsort(1)[:, :pairs]
        digits = code[..., None] // number[..., None] ** torch.arange(tokens, device=device) % number[..., None]
        made = (order + self.FIRST - FIRST_SYMBOL).gather(1, digits.flatten(1)).view_as(digits)
        return torch.where((number == self.alphabet)[..., None], words, made)

    def _values(self, pairs: int, batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Values of each row, (B, pairs, tokens), different ones unless ``value_symbols`` says otherwise."""
        if self.value_symbols is None:
            return self._pools(device)[1][distinct(pairs, self.words, batch, generator, device)]
        places = batch * self.value_tokens
        number, order = choose_symbols(self.value_symbols, self.alphabet, places, generator, device)
        chosen = order.gather(1, uniform_below(number, (places, pairs), generator))
        return (chosen + self.FIRST - FIRST_SYMBOL).view(batch, self.value_tokens, pairs).transpose(1, 2)

    def _starts(self, lengths: Tensor, count: Tensor, pairs: int, generator: torch.Generator | None) -> Tensor:
        """Where each pair starts, (B, pairs); undefined for pairs beyond ``count`` (B, 1)."""
        index = torch.arange(pairs, device=lengths.device)[None]
        shape = (lengths.shape[0], pairs)
        if self.gaps == "slots":
            slot = index * lengths // count
            room = (index + 1) * lengths // count - slot - self.pair_span
            return slot + uniform_below(room + 1, shape, generator)
        room = lengths - count * self.pair_span
        before = uniform_below((room + 1).expand(shape), shape, generator)
        before = torch.where(index < count, before, room + 1).sort(dim=1).values
        return before + index * self.pair_span


def distinct(count: int, words: int, batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """``count`` different integers below ``words`` in each row, int64 (batch, count), every choice equally likely."""
    if 4 * count > words:
        return torch.rand(batch, words, generator=generator, device=device).argsort(dim=1)[:, :count]
    drawn = torch.randint(words, (batch, count), generator=generator, device=device)
    # What repeats an earlier one is drawn again; the expected number of repeats shrinks by count / words each time.
    repeats = batch * count**2 / (2 * words) / _REPEAT_CHANCE
    for _ in range(max(1, math.ceil(math.log(repeats) / math.log(words / count)))):
        ordered, order = drawn.sort(dim=1, stable=True)
        again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        again = torch.zeros_like(again).scatter(1, order, again)
        drawn = torch.where(again, torch.randint(words, (batch, count), generator=generator, device=device), drawn)
    return drawn


def _choose(words: Tensor, index: Tensor) -> Tensor:
    """``words[b, index[b, i]]`` for words (B, pairs, tokens)."""
    return words.gather(1, index[..., None].expand(-1, -1, words.shape[2]))


@functools.lru_cache(maxsize=16)
def _pools(
    alphabet: int, key_tokens: int, value_tokens: int, words: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids of the keys (words, key tokens) and of the values."""
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for tokens in (key_tokens, value_tokens):
        number = torch.randperm(alphabet**tokens, generator=generator)[:words, None]
        digits = number // alphabet ** torch.arange(tokens) % alphabet
        pools.append((digits + Recall.FIRST).to(device))
    return pools[0], pools[1]
