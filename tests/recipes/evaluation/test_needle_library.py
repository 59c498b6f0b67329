"""The cache of samples and batched greedy generation."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse_attention.evaluation.needle_tasks import NeedleFormat, NeedleSource
from hf_sparse_attention.evaluation.needles import answer_batch, cached_samples, check_batch, run_grid

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


@pytest.mark.parametrize("name", ["softmax", "asentmax"])
@pytest.mark.parametrize("right", [0, 1, 3, None])
def test_one_forward_pass_decides_as_generation_does(request, tokenizer, source, tmp_path, name, right):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"{name}_checkpoint")).eval()
    samples, generated = [], []
    for sample in cell(source, tmp_path) + cell(source, tmp_path, length=99, answer_tokens=9):
        # What the model says becomes the right answer, up to a token that is not what it says.
        ids = greedy(model, sample)
        generated.append(ids)
        if right is not None:
            ids = [*ids[:right], (ids[right] + 1) % len(tokenizer), *ids[right + 1 :]]
        samples.append(dataclasses.replace(sample, answer="the answer", answer_ids=ids))
    assert len({len(sample.prompt_ids) + len(sample.answer_ids) for sample in samples}) > 1
    for sample, ids, answer in zip(samples, generated, check_batch(model, tokenizer, samples), strict=True):
        said = ids if right is None else ids[: right + 1]
        assert answer.prediction == tokenizer.decode(said, skip_special_tokens=True)
        assert (answer.depth, answer.index, answer.answer) == (sample.depth, sample.index, "the answer")


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
