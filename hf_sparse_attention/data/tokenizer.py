"""A byte-level BPE tokenizer trained on the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, max_characters: int = 50_000_000, characters_per_text: int = 200_000
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with bos, eos and pad tokens; digits are single tokens, any text can be encoded.

    Called on a text it puts ``bos`` in front; ``add_special_tokens=False`` leaves it out.

    Args:
        texts: documents, read until ``max_characters`` are taken, from each at most ``characters_per_text``.
        vocab_size: at least 259 (256 bytes and the special tokens). A short text may give fewer tokens.

    Raises:
        ValueError: ``vocab_size`` is too small, or there is no text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least {SMALLEST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = list(_limited(texts, max_characters, characters_per_text))
    if not pieces:
        raise ValueError("no text to train a tokenizer on")
    tokenizer.train_from_iterator(pieces, trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def _limited(texts: Iterable[str], max_characters: int, characters_per_text: int) -> Iterator[str]:
    taken = 0
    for text in texts:
        piece = text[: min(characters_per_text, max_characters - taken)]
        if piece.strip():
            taken += len(piece)
            yield piece
        if taken >= max_characters:
            return
