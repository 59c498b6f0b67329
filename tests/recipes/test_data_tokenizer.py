"""The byte-level tokenizer: any text survives, training is reproducible, saving keeps it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_sparse_attention.data import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 320)


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=60))
def test_any_text_survives(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode("utf-8")


def test_special_tokens_and_digits(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer("1234")["input_ids"][0] == tokenizer.bos_token_id
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4
    assert len(tokenizer) == 320


def test_training_is_reproducible(tokenizer, documents):
    again = train_tokenizer(iter(documents), 320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_and_loaded(tokenizer, documents, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(documents[:3])["input_ids"] == tokenizer(documents[:3])["input_ids"]
    assert loaded.decode(loaded(documents[0])["input_ids"][1:]) == documents[0]
    assert loaded.pad_token == tokenizer.pad_token


@pytest.mark.parametrize(("texts", "size", "message"), [(["a"], 258, "at least 259"), ([" "], 300, "no text")])
def test_errors(texts, size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, size)
