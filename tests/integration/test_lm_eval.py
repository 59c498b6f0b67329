"""EleutherAI's evaluation harness (lm-eval) scores a saved checkpoint as the model itself does."""

import json
import os
import string
import subprocess
import sys

import datasets
import harness
import pytest
import torch
from families import alone, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_sparse_attention.hub import REMOTE_CODE_FILE

ALPHABET = " ".join(string.ascii_lowercase)
# The lengths differ within a batch, so the harness pads.
DOCUMENTS = [
    {"text": "a b c", "choices": ["d", "e f g"], "answer": 0},
    {"text": "n", "choices": ["o p", "q", "r s t u v"], "answer": 2},
    {"text": ALPHABET, "choices": [ALPHABET[::-1], "a"], "answer": 1},
    {"text": ALPHABET[6:37], "choices": ["m m", "k"], "answer": 0},
]
TASK = {"dataset_path": "json", "test_split": "test", "doc_to_text": "", "doc_to_target": "{{text}}"}
TASKS = {
    "choice": {
        **TASK,
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {**TASK, "output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]},
}


@pytest.fixture
def tasks(tmp_path):
    """A folder of task files over local documents."""
    data, folder = tmp_path / "documents.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    folder.mkdir()
    for name, task in TASKS.items():
        fields = {"task": name, **task, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        # YAML reads JSON.
        (folder / f"{name}.yaml").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A saved model with its tokenizer: the folder, and what the harness should report."""
    folder, model = tmp_path / "model", tiny_model(position="nape")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", *string.ascii_lowercase])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="<s>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def score(context, continuation):
        context, continuation = (tokenizer(text)["input_ids"] for text in (context, continuation))
        ids = torch.tensor(context + continuation)
        predictions = alone(model, ids)[:-1].log_softmax(-1)
        return predictions.gather(1, ids[1:, None])[-len(continuation) :].sum().item()

    return folder, {
        "choice": [[score(document["text"], choice) for choice in document["choices"]] for document in DOCUMENTS],
        "rolling": [score("<s>", document["text"]) for document in DOCUMENTS],
    }


def assert_equal(scores, expected):
    choices = [value for document in scores["choice"] for value, _ in document]
    expected_choices = [value for document in expected["choice"] for value in document]
    torch.testing.assert_close(torch.tensor(choices), torch.tensor(expected_choices), atol=1e-4, rtol=1e-5)
    rolling = torch.tensor(scores["rolling"]).flatten()
    torch.testing.assert_close(rolling, torch.tensor(expected["rolling"]), atol=1e-4, rtol=1e-5)


def test_by_import(checkpoint, tasks, tmp_path, monkeypatch):
    folder, expected = checkpoint
    (folder / REMOTE_CODE_FILE).unlink()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert_equal(harness.harness_scores(folder, tasks), expected)


def test_by_trust(checkpoint, tasks, tmp_path):
    folder, expected = checkpoint
    process = subprocess.run(
        [sys.executable, harness.__file__, folder, tasks],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    assert not results["imported before"]
    assert_equal(results["scores"], expected)
