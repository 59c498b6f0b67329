"""Text for pretraining: documents, tokenizer, rows of packed tokens."""

from .packing import MixedRows, PackedRows, collate_rows
from .text import DataError, is_local, load_documents
from .tokenizer import train_tokenizer

__all__ = ["DataError", "MixedRows", "PackedRows", "collate_rows", "is_local", "load_documents", "train_tokenizer"]
