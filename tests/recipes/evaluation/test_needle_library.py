"""The cache of samples and batched greedy generation."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse_attention.evaluation.needle_tasks import NeedleFormat, NeedleSource
from hf_sparse_attention.evaluation.needles import answer_batch, cached_samples, run_grid

SHORT = NeedleFormat("short", number_digits=4, uuid_characters=8)


@pytest.fixture
def source(tokenizer, essay):
    return NeedleSource(tokenizer, essay, SHORT)


def cell(source, folder, **changes):
    settings = {"task": "s_niah_3", "length": 97, "depths": [0.0, 0.5], "samples": 3, "seed": 1}
    return cached_samples(source, folder, **{**settings, **changes})


def greedy(model, sample):
    """Step by step, without batch, padding or cache."""
    ids = list(sample.prompt_ids)
    for _ in range(sample.length - len(sample.prompt_ids)):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(sample.prompt_ids) :]


def test_samples_are_written_once_and_read_back(source, tmp_path):
    made = cell(source, tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("s_niah_3_length97_seed1_")
    assert made == cell(source, tmp_path)
    assert [(s.depth, s.index) for s in made] == [(d, i) for d in (0.0, 0.5) for i in range(3)]
    changed = dataclasses.replace(made[0], answer="from the file")
    file.write_text(json.dumps(dataclasses.asdict(changed)) + "\n")
    assert cell(source, tmp_path) == [changed]


@pytest.mark.parametrize(
    "changes", [{"depths": [0.0, 1.0]}, {"samples": 2}, {"seed": 2}, {"answer_tokens": 12}, {"length": 98}]
)
def test_other_settings_use_another_file(source, tmp_path, changes):
    first = cell(source, tmp_path)
    assert cell(source, tmp_path, **changes) != first
    assert len(list(tmp_path.iterdir())) == 2


def test_other_formats_texts_and_bos_use_other_files(tokenizer, essay, tmp_path):
    for text, form, bos in (
        (essay, SHORT, False),
        (essay[100:], SHORT, False),
        (essay, NeedleFormat("short", 4, 9), False),
        (essay, SHORT, True),
    ):
        cell(NeedleSource(tokenizer, text, form, bos), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["softmax", "asentmax"])
def test_batched_answers_equal_greedy_steps(request, tokenizer, source, tmp_path, name):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"{name}_checkpoint")).eval()
    # Leftover settings of a checkpoint must not matter.
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=1.9)
    samples = cell(source, tmp_path)
    assert len({len(sample.prompt_ids) for sample in samples}) > 1, "the batch must need padding"
    for sample, answer in zip(samples, answer_batch(model, tokenizer, samples), strict=True):
        expected = tokenizer.decode(greedy(model, sample), skip_special_tokens=True)
        assert answer.prediction == expected
        assert (answer.depth, answer.index, answer.answer) == (sample.depth, sample.index, sample.answer)


def test_shares_of_two_processes_make_up_one(softmax_checkpoint, tokenizer, source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint).eval()
    cells = [cell(source, tmp_path), cell(source, tmp_path, length=130)]
    whole = run_grid(model, tokenizer, cells, batch_tokens=200)
    shares = [
        answer
        for rank in range(2)
        for answer in run_grid(model, tokenizer, cells, batch_tokens=200, process=rank, processes=2)
    ]
    assert len(whole) == 12
    assert sorted(map(repr, whole)) == sorted(map(repr, shares))
