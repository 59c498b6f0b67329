"""A small tokenizer, long documents and two tiny checkpoints, made once for all evaluation tests."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import hf_sparse_attention  # noqa: F401

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture(scope="session")
def essay() -> str:
    return (RECIPES / "data" / "haystack.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer(essay) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [essay], trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, 400) for _ in range(count)] for count in (61, 133, 97)]


def save_checkpoint(folder: Path, tokenizer, **changes) -> Path:
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "initializer_range": 0.5,  # far from uniform predictions, so that a wrong context changes the losses
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_checkpoint():
    return save_checkpoint


@pytest.fixture(scope="session")
def softmax_checkpoint(tmp_path_factory, tokenizer) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("softmax"), tokenizer)


@pytest.fixture(scope="session")
def asentmax_checkpoint(tmp_path_factory, tokenizer) -> Path:
    return save_checkpoint(
        tmp_path_factory.mktemp("asentmax"),
        tokenizer,
        attn_implementation="asentmax",
        sparse_attention={"position_encoding": "nape"},
    )
