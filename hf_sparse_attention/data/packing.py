"""Fixed-length rows of packed documents, in a seeded order that can be continued anywhere.

Documents are tokenized, put between bos and eos, joined, and cut every ``length`` tokens. Rows are shuffled within
blocks of some million tokens. A block is a function of its start (epoch and document) alone, so the position in the
data is a handful of integers: continuing means making the current block again and going to the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .text import DataError
from .tokenized import TOKENS, encode_documents

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
# Documents are tokenized this many characters at a time: enough for the tokenizer to use all cores.
_BATCH_CHARACTERS = 1 << 22
Row = dict[str, torch.Tensor]


class PackedRows:
    """Iterate over rows ``{"input_ids", "labels", "position_ids"}``, each a LongTensor of shape (length,).

    Positions restart at 0 at every document start and at the row start, and the first token of a document is no
    label, so that attention, positions and loss stay within documents. With ``cross_documents`` rows have no
    ``position_ids``: a model then counts through the row, and need not look for documents in it. Every token is a
    label then.

    Args:
        documents: a data set with the column ``text``, or a list of texts. A streamed one is read in stored order.
            Or a data set with the column ``input_ids``, as :func:`tokenize_documents` makes it: quicker, as every
            epoch reads the same tokens.
        tokenizer: gives bos and eos, if it has them, around each document.
        length: tokens per row.
        seed: order of documents (not streamed) and of rows.
        cross_documents: let attention cross document boundaries.
        block_tokens: how many tokens, at least, are shuffled together; the rest of a block after its last full row
            (under ``length`` tokens) is left out.
        epochs: how often to go through the documents; None goes on for ever.

    Raises (while iterating):
        DataError: the documents give not even one row, or one of them is not text.
    """

    def __init__(
        self,
        documents: datasets.Dataset | datasets.IterableDataset | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        seed: int = 0,
        cross_documents: bool = False,
        block_tokens: int = 1 << 22,
        epochs: int | None = None,
    ) -> None:
        if length < 2:
            raise ValueError(f"length is {length}; a row needs at least 2 tokens")
        self.tokenizer = tokenizer
        self.length = length
        self.seed = seed
        self.cross_documents = cross_documents
        self.block_tokens = block_tokens
        self.epochs = epochs
        self._reader = _open(documents, seed)
        self._start = _BlockStart(epoch=0, index=0, document=None)
        self._row = 0

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {
            **self._fingerprint(),
            "epoch": self._start.epoch,
            "block": self._start.index,
            "document": self._start.document,
            "row": self._row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position. Raises DataError if it belongs to other data or another way of packing."""
        for name, value in self._fingerprint().items():
            if state.get(name) != value:
                raise DataError(f"the saved data position has {name} {state.get(name)!r}, this run has {value!r}")
        self._start = _BlockStart(state["epoch"], state["block"], state["document"])
        self._row = state["row"]

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "seed": self.seed,
            "cross_documents": self.cross_documents,
            "block_tokens": self.block_tokens,
            "documents": self._reader.size,
            "vocabulary": len(self.tokenizer),
        }

    def __iter__(self) -> Iterator[Row]:
        # One thread makes the next block while the rows of this one are used.
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pack") as executor:
            block = self._make_block(self._start)
            while block is not None:
                upcoming: Future[_Block | None] = executor.submit(self._make_block, block.next)
                while self._row < len(block.order):
                    row = int(block.order[self._row])
                    self._row += 1
                    yield {name: column[row] for name, column in block.columns.items()}
                self._start, self._row = block.next, 0
                block = upcoming.result()

    def _make_block(self, start: _BlockStart) -> _Block | None:
        """The next block that has at least one row; None at the end of the last epoch."""
        while self.epochs is None or start.epoch < self.epochs:
            self._reader.seek(start.epoch, start.document)
            tokens, first, ended = self._read_tokens()
            rows = len(tokens) // self.length
            if not rows and ended and start.document is None:
                raise DataError(
                    f"the {self._reader.described} hold {len(tokens)} tokens, fewer than one row of {self.length}; "
                    "give more text or a shorter length"
                )
            document = None if ended else self._reader.tell()
            upcoming = _BlockStart(start.epoch + ended, start.index + 1, document)
            if rows:
                shape = (rows, self.length)
                order = np.random.default_rng([self.seed, start.index]).permutation(rows)
                kept = rows * self.length
                columns = self._make_columns(tokens[:kept].reshape(shape), first[:kept].reshape(shape))
                return _Block(columns, order, upcoming)
            start = upcoming
        return None

    def _make_columns(self, tokens: np.ndarray, first: np.ndarray) -> Row:
        """All rows of a block at once, (rows, length); a row of it is a view."""
        input_ids = torch.from_numpy(tokens.astype(np.int64))
        if self.cross_documents:
            return {"input_ids": input_ids, "labels": input_ids}
        index = np.arange(self.length)
        positions = index - np.maximum.accumulate(np.where(first, index, 0), axis=1)
        labels = input_ids.masked_fill(torch.from_numpy(first), IGNORED_LABEL)
        return {"input_ids": input_ids, "labels": labels, "position_ids": torch.from_numpy(positions)}

    def _read_tokens(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Tokens of whole documents, which of them begin a document, and whether the epoch ended."""
        pieces: list[np.ndarray] = []
        total, ended = 0, False
        wanted = max(self.block_tokens, self.length)
        while total < wanted and not ended:
            documents, size = [], 0
            while size < (wanted - total if self._reader.tokenized else min(_BATCH_CHARACTERS, 4 * wanted)):
                document = self._reader.read()
                if document is None:
                    ended = True
                    break
                if self._reader.tokenized or document.strip():
                    documents.append(document)
                    size += len(document)
            for ids in documents if self._reader.tokenized else encode_documents(documents, self.tokenizer):
                pieces.append(ids)
                total += len(ids)
        if not total:
            return np.zeros(0, np.int32), np.zeros(0, bool), ended
        pieces = [piece for piece in pieces if len(piece)]
        first = np.zeros(total, bool)
        first[np.cumsum([0] + [len(piece) for piece in pieces[:-1]])] = True
        return np.concatenate(pieces), first, ended


class MixedRows:
    """Packed rows of which a share is replaced by rows of another kind, e.g. retrieval tasks.

    Args:
        rows: the packed rows.
        extra: ``extra(start)`` iterates over ``{"input_ids", "labels"}`` lists of ``rows.length`` tokens from number
            ``start`` on.
        fraction: share of extra rows, in [0, 1).
        weight: how much a label of an extra row counts in the loss. Unless it is 1, every row has ``label_weights``.
    """

    def __init__(
        self,
        rows: PackedRows,
        extra: Callable[[int], Iterator[dict[str, list[int]]]],
        fraction: float,
        weight: float = 1.0,
    ):
        if not 0 <= fraction < 1:
            raise ValueError(f"fraction is {fraction}; allowed: at least 0 and below 1")
        self.rows = rows
        self.extra = extra
        self.fraction = fraction
        self.weight = weight
        self._drawn = 0
        self._extra_drawn = 0

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {
            **self.rows.state_dict(),
            "extra_fraction": self.fraction,
            "drawn": self._drawn,
            "extra_drawn": self._extra_drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position. Raises DataError if it belongs to other data or another mixture."""
        if state.get("extra_fraction") != self.fraction:
            raise DataError(
                f"the saved data position has extra_fraction {state.get('extra_fraction')!r}, "
                f"this run has {self.fraction!r}"
            )
        self.rows.load_state_dict(state)
        self._drawn, self._extra_drawn = state["drawn"], state["extra_drawn"]

    def __iter__(self) -> Iterator[Row]:
        packed, extra = iter(self.rows), self.extra(self._extra_drawn)
        while True:
            # One generator per row: the choice does not depend on where a run was interrupted.
            is_extra = np.random.default_rng([self.rows.seed, self._drawn]).random() < self.fraction
            self._drawn += 1
            if is_extra:
                self._extra_drawn += 1
                row = {name: torch.tensor(values) for name, values in next(extra).items()}
                positions = {} if self.rows.cross_documents else {"position_ids": torch.arange(self.rows.length)}
                yield {**row, **positions, **self._weights(self.weight)}
            else:
                try:
                    yield {**next(packed), **self._weights(1.0)}
                except StopIteration:
                    return

    def _weights(self, weight: float) -> Row:
        return {} if self.weight == 1 else {"label_weights": torch.full((self.rows.length,), weight)}


def collate_rows(rows: Sequence[Row]) -> Row:
    """Stack rows to a batch of tensors (batch, length)."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class _BlockStart:
    epoch: int
    index: int
    document: Any  # where in the epoch; None is its start


@dataclass(frozen=True)
class _Block:
    columns: Row  # each [rows, length]
    order: np.ndarray  # [rows]
    next: _BlockStart


def _open(documents: Any, seed: int) -> _ShuffledReader | _StreamReader:
    if hasattr(documents, "__getitem__") and hasattr(documents, "__len__"):
        return _ShuffledReader(documents, seed)
    return _StreamReader(documents)


class _ShuffledReader:
    """Documents that can be indexed, in another order every epoch. A position is the number of documents read."""

    def __init__(self, documents: Any, seed: int) -> None:
        self.tokenized = TOKENS in getattr(documents, "column_names", ())
        self._documents = documents.with_format("numpy") if self.tokenized else documents
        self._seed = seed
        self.size: int | None = len(documents)
        self.described = f"{self.size} documents"
        self._order = np.zeros(0, np.int64)
        self._next = 0

    def seek(self, epoch: int, document: int | None) -> None:
        self._order = np.random.default_rng([self._seed, epoch]).permutation(self.size)
        self._next = document or 0

    def tell(self) -> int:
        return self._next

    def read(self) -> str | np.ndarray | None:
        if self._next >= self.size:
            return None
        number = int(self._order[self._next])
        self._next += 1
        record = self._documents[number]
        if self.tokenized:
            return record[TOKENS]
        return _text(record["text"] if isinstance(record, Mapping) else record, f"document {number}")


class _StreamReader:
    """A streamed data set in stored order. A position is the data set's own state."""

    tokenized = False

    def __init__(self, documents: datasets.IterableDataset) -> None:
        # A fresh view: the data set itself may have been iterated over before, and would go on from there.
        self._documents = documents.select_columns(["text"])
        self._beginning = self._documents.state_dict()
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._at: tuple[int, Any] | None = None
        self._epoch = 0
        self.size: int | None = None
        self.described = "streamed documents"

    def seek(self, epoch: int, document: dict[str, Any] | None) -> None:
        if self._iterator is not None and document is not None and self._at == (epoch, document):
            return  # already there: keep the open connection
        self._documents.load_state_dict(self._beginning if document is None else document)
        self._iterator = iter(self._documents)
        self._epoch = epoch

    def tell(self) -> dict[str, Any]:
        position = self._documents.state_dict()
        self._at = (self._epoch, position)
        return position

    def read(self) -> str | None:
        record = next(self._iterator, None)
        return None if record is None else _text(record["text"], "a streamed document")


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: text is {value!r:.80}, not a string")
    return value
