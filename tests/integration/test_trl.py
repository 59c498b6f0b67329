"""TRL's SFTTrainer: packed and padding-free training has the losses of unpacked training, so documents never leak."""

import itertools

import pytest
import torch
from datasets import Dataset
from families import VOCAB, prompts, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from hf_sparse_attention import AlphaScheduleCallback, check_trainable, lora_config
from hf_sparse_attention.training import get_alpha

# TRL sets the options of transformers' Trainer under their old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
LENGTHS = (9, 4, 7, 11, 5, 3)
MAX_LENGTH = 16
# Enough for all documents, so that each step sees all of them however they are packed.
ALL = len(LENGTHS)
PACKED = {
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
}


def labels(documents):
    """Older Trainers count a row's first token in the mean, unless it is no label."""
    return [[-100, *document[1:]] for document in documents]


@pytest.fixture
def documents():
    return [prompt.tolist() for prompt in prompts(*LENGTHS)]


@pytest.fixture
def train(tmp_path):
    vocabulary = {str(i): i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="2")), pad_token="0", eos_token="2"
    )

    def run(documents, family="llama", position="nape", targets=None, lora=False, alpha_steps=0, **options):
        set_seed(0)
        model = tiny_model(family, position=position)
        defaults = {
            "per_device_train_batch_size": ALL,
            "max_length": MAX_LENGTH,
            "max_steps": 3,
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        trainer = SFTTrainer(
            model,
            SFTConfig(str(tmp_path), **{**defaults, **options}),
            train_dataset=Dataset.from_dict({"input_ids": documents, "labels": targets or labels(documents)}),
            processing_class=tokenizer,
            peft_config=lora_config(model) if lora else None,
            callbacks=[AlphaScheduleCallback(model, alpha_steps)] if alpha_steps else None,
        )
        trainer.train()
        return trainer

    return run


def losses(trainer):
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize("position", ["model", "nape"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_losses_and_weights_are_those_of_unpacked_training(train, documents, family, position):
    unpacked = train(documents, family, position)
    for name, options in PACKED.items():
        packed = train(documents, family, position, **options)
        assert losses(packed) == pytest.approx(losses(unpacked), abs=1e-4), name
        for (key, a), b in zip(packed.model.named_parameters(), unpacked.model.parameters()):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda text, k=key, n=name: f"{n} {k}: {text}")


def test_packing_puts_several_documents_into_a_row(train, documents):
    rows = train(documents, packing=True, max_steps=1).train_dataset["seq_lengths"]
    assert len(rows) < ALL
    assert sorted(length for row in rows for length in row) == sorted(LENGTHS)


def test_documents_that_bfd_splits_are_documents_of_their_own(train):
    (long, short) = (prompt.tolist() for prompt in prompts(21, 6))
    split = train([long, short], packing=True, packing_strategy="bfd_split")
    assert losses(split) == pytest.approx(losses(train([long[:MAX_LENGTH], long[MAX_LENGTH:], short])), abs=1e-4)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
def test_wrapped_rows_are_single_documents_and_do_not_leak_into_each_other(train, documents, padding_free):
    """The wrapped strategy drops document boundaries before any model sees the row."""
    wrapped = train(documents, packing=True, packing_strategy="wrapped", padding_free=padding_free)
    unpacked = {"padding_free": True, "max_length": None} if padding_free else {}
    tokens = list(itertools.chain(*documents))
    rows = [tokens[start : start + MAX_LENGTH] for start in range(0, len(tokens), MAX_LENGTH)]
    assert [list(row) for row in wrapped.train_dataset["input_ids"]] == rows
    # Older versions of TRL drop the labels when they pack.
    has_labels = "labels" in wrapped.train_dataset.column_names
    targets = [list(row) for row in wrapped.train_dataset["labels"]] if has_labels else rows
    assert losses(wrapped) == pytest.approx(losses(train(rows, targets=targets, **unpacked)), abs=1e-4)


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_lora_with_an_alpha_schedule(train, documents, options):
    shared = {"lora": True, "alpha_steps": 2, "learning_rate": 1.0}
    packed, unpacked = train(documents, **shared, **options), train(documents, **shared)
    assert losses(packed) == pytest.approx(losses(unpacked), abs=1e-4)
    assert check_trainable(packed.model) == []
    assert get_alpha(packed.model) == 1.5
    scale = {n: p for n, p in packed.model.named_parameters() if "length_scale.modules_to_save" in n}
    original = dict(packed.model.named_parameters())
    moved = [
        n for n, p in scale.items() if not p.equal(original[n.replace("modules_to_save.default", "original_module")])
    ]
    assert len(moved) == len(scale) == 8
