"""Text for pretraining: documents, tokenizer, rows of packed tokens."""

from .packing import MixedRows, PackedRows, collate_rows
from .text import DataError, load_documents
from .tokenizer import train_tokenizer

__all__ = ["DataError", "MixedRows", "PackedRows", "collate_rows", "load_documents", "train_tokenizer"]
