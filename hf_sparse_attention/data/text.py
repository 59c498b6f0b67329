"""Documents from local files or from the Hub, through the ``datasets`` library."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_CHECKED_BYTES = 1 << 16


class DataError(ValueError):
    """Text cannot be read; the message names the file or the data set, and the field."""


def load_documents(
    source: str | Sequence[str],
    *,
    text_field: str = "text",
    split: str = "train",
    subset: str | None = None,
    streaming: bool | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load documents as a data set with one column, ``text``.

    Args:
        source: local files, folders or glob patterns (.txt, .md: one document per file; .jsonl, .json, .parquet: one
            per record; also compressed with .xz, .gz or .bz2), or one data set name of the Hub.
        text_field: the field of a record that holds its text. Plain text files have the field ``text``.
        split, subset: which part of a Hub data set.
        streaming: read on the fly, in stored order, instead of keeping a copy in the datasets cache, which allows
            shuffling of documents. Default: stream Hub data sets, copy local files.

    Raises:
        DataError: nothing there, an empty, binary or broken file, no such field, or a field that is not text.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError("no text files or data set given")
    if all(is_local(name) for name in sources):
        files = [file for name in sources for file in _local_files(name)]
        for file in files:
            _check_file(file)
        parts = [_load_file(file, bool(streaming)) for file in files]
        names = [str(file) for file in files]
    elif len(sources) == 1:
        parts, names = [_load_hub(sources[0], split, subset, streaming is not False)], sources
    else:
        unknown = [name for name in sources if not is_local(name)]
        raise DataError(f"{unknown[0]}: no such file; a Hub data set must be the only source")
    parts = [_text_only(part, name, text_field) for part, name in zip(parts, names)]
    if len(parts) == 1:
        return parts[0]
    # parquet may say large_string where the others say string
    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.concatenate_datasets([part.cast(features) for part in parts])


def iterate_texts(documents: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of documents from :func:`load_documents`; a record without one (null) is a blank document."""
    return (record["text"] or "" for record in documents)


def is_local(name: str) -> bool:
    """Whether ``name`` means a path, not a data set of the Hub."""
    path = Path(name)
    return bool(
        path.is_absolute()
        or path.exists()
        or name.startswith((".", "~"))
        or glob.has_magic(name)
        or _format_of(path) is not None
    )


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _local_files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _format_of(file))
        if not files:
            raise DataError(f"{name}: no {', '.join(FORMATS)} file in this folder")
        return files
    if glob.has_magic(name) and not path.exists():
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise DataError(f"{name}: no file matches")
        return files
    if not path.exists():
        raise DataError(f"{name}: no such file")
    return [path]


def _check_file(path: Path) -> None:
    """Refuse what is surely not text, before the datasets library reports it from deep inside."""
    kind = _format_of(path)
    if kind is None:
        raise DataError(
            f"{path}: unknown ending; supported: {', '.join(FORMATS)}, also with {', '.join(COMPRESSIONS)}"
        )
    opener = COMPRESSIONS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            head = file.read(_CHECKED_BYTES)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not head:
        raise DataError(f"{path}: the file is empty")
    if kind == "parquet":
        if not head.startswith(b"PAR1"):
            raise DataError(f"{path}: not a parquet file")
        return
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if "\0" in text:
        raise DataError(f"{path}: a binary file, not text (zero byte at {head.index(0)})")
    if not text.strip() and len(head) < _CHECKED_BYTES:
        raise DataError(f"{path}: the file holds only white space")


def _load_file(path: Path, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    kind = _format_of(path)
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming, **options)
    except Exception as error:  # the library wraps parser errors of many packages
        raise DataError(f"{path}: cannot be read as {kind} ({_root_cause(error)})") from error


def _load_hub(
    name: str, split: str, subset: str | None, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    try:
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:  # network, missing repository, missing split: all have their own types
        raise DataError(
            f"{name}: neither a local file nor a data set that could be loaded from the Hub ({_root_cause(error)})"
        ) from error


def _text_only(
    part: datasets.Dataset | datasets.IterableDataset, name: str, field: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Only the text column, named ``text``, after a look at the first record that has something in it."""
    empty = 0
    try:
        records = iter(part)
        while (record := next(records, None)) is not None and field in record and record[field] is None:
            empty += 1
    except Exception as error:  # streamed: the file is parsed only here
        raise DataError(f"{name}: cannot be read ({_root_cause(error)})") from error
    if record is None:
        raise DataError(f"{name}: field {field!r} is null in all records" if empty else f"{name}: no records")
    if field not in record:
        raise DataError(f"{name}: no field {field!r}; it has {', '.join(map(repr, record))}")
    if not isinstance(record[field], str):
        raise DataError(f"{name}: field {field!r} holds {type(record[field]).__name__}, not text")
    part = part.select_columns([field])
    return part if field == "text" else part.rename_column(field, "text")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
