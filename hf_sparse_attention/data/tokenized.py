"""Documents as token ids: tokenized once, kept in the datasets cache, read without copying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import datasets
import numpy as np
from datasets.fingerprint import Hasher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = "input_ids"
# Some books at a time: a fast tokenizer puts them on all cores, if TOKENIZERS_PARALLELISM allows it.
_DOCUMENTS_AT_ONCE = 64


def encode_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids, int32, of each text between bos and eos, if the tokenizer has them."""
    if not texts:
        return []
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [np.array([*before, *ids, *after], dtype=np.int32) for ids in encoded[TOKENS]]


def tokenize_documents(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """Documents with the one column ``input_ids``, each between bos and eos; blank documents have none.

    The result is kept in the datasets cache under the text and the tokenizer, so that further epochs, runs and
    processes read it instead of tokenizing again.

    Args:
        documents: a data set with the column ``text``.
        tokenizer: any tokenizer of transformers.
    """

    def encode(batch: dict[str, list[str | None]]) -> dict[str, list[np.ndarray]]:
        texts = [text or "" for text in batch["text"]]
        kept = iter(encode_documents([text for text in texts if text.strip()], tokenizer))
        return {TOKENS: [next(kept) if text.strip() else np.zeros(0, np.int32) for text in texts]}

    fast = getattr(tokenizer, "backend_tokenizer", None)
    # The object itself hashes differently once it has been called.
    identity = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return documents.map(
        encode,
        batched=True,
        batch_size=_DOCUMENTS_AT_ONCE,
        remove_columns=documents.column_names,
        features=datasets.Features({TOKENS: datasets.List(datasets.Value("int32"))}),
        new_fingerprint=Hasher.hash((documents._fingerprint, identity, special)),
        desc="Tokenizing",
    )
