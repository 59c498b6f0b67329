"""Text for pretraining: documents, tokenizer, rows of packed tokens."""

from .packing import IGNORED_LABEL, MixedRows, PackedRows, collate_rows
from .steps import StepRows, count_labels, split_batches, step_rows
from .text import DataError, is_local, iterate_texts, load_documents
from .tokenized import tokenize_documents
from .tokenizer import train_tokenizer

__all__ = [
    "IGNORED_LABEL",
    "DataError",
    "MixedRows",
    "PackedRows",
    "StepRows",
    "collate_rows",
    "count_labels",
    "is_local",
    "iterate_texts",
    "load_documents",
    "split_batches",
    "step_rows",
    "tokenize_documents",
    "train_tokenizer",
]
