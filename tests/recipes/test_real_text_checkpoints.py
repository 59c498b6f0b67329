"""The language models that the repository holds: they load, read a text as measured, and their cards are current."""

import functools
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_run import RECIPES, ROOT

from hf_sparse_attention.data import load_documents
from hf_sparse_attention.evaluation.checkpoints import CheckpointSpec, load_model, load_tokenizer
from hf_sparse_attention.evaluation.perplexity import PerplexityPlan, run_plan

CHECKPOINTS = ROOT / "model_cards" / "real_text"
# Run of each, and its loss per token at 1x and 4x on the last 512 tokens of a window of the excerpt.
RUNS = {"asentmax_nape": "asentmax_nape_alibi3_s0", "softmax_rope": "softmax_rope_s0"}
EXPECTED = {"asentmax_nape": {1024: 3.976, 4096: 4.011}, "softmax_rope": {1024: 3.959, 4096: 5.582}}


@functools.cache
def losses(name):
    spec = CheckpointSpec(name, str(CHECKPOINTS / name))
    tokenizer = load_tokenizer(spec)
    text = load_documents([str(RECIPES / "data" / "haystack.txt")])[0]["text"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    plan = PerplexityPlan(lengths=(1024, 4096), target_tokens=512, stride=512, windows_per_document=1)
    model = load_model(spec, tokenizer, train_length=1024, max_length=4096, dtype="float32")
    with torch.inference_mode():
        found = run_plan(model, [ids], plan, batch_tokens=4096)
    targets = [loss for loss in found if loss.bucket is None]
    return {length: sum(loss.nll for loss in targets if loss.length == length) / 512 for length in plan.lengths}


def test_every_model_is_measured():
    assert {path.parent.name for path in CHECKPOINTS.glob("*/config.json")} == set(RUNS)
    assert all(path.stat().st_size < 16 * 2**20 for path in CHECKPOINTS.glob("*/*"))


@pytest.mark.parametrize("name", RUNS)
def test_a_bundled_text_is_read_as_before(name):
    assert losses(name) == pytest.approx(EXPECTED[name], abs=0.005)


def test_only_one_of_them_reads_longer_texts():
    sparse, dense = losses("asentmax_nape"), losses("softmax_rope")
    assert sparse[4096] < sparse[1024] + 0.05
    assert dense[4096] > dense[1024] + 1


@pytest.mark.parametrize("name", RUNS)
def test_a_card_has_the_numbers_of_its_run(name):
    report = json.loads((ROOT / "model_cards" / "results" / "real_text" / "real_text.json").read_text("utf-8"))
    run = report["runs"][RUNS[name]]
    card = ModelCard.load(CHECKPOINTS / name / "README.md")
    shown = {entry.dataset_type: entry.metric_value for entry in card.data.eval_results}
    measured = run["perplexity"]["checkpoints"][RUNS[name]]["by_length"]
    assert {f"text-{length}": cell["perplexity"] for length, cell in measured.items()}.items() <= shown.items()
    for part in run["needle"]:
        for task, grid in part["checkpoints"][RUNS[name]]["recall"].items():
            for length, column in zip(part["protocol"]["lengths"], zip(*grid, strict=True), strict=True):
                assert shown[f"{task}-{length}"] == pytest.approx(sum(column) / len(column))
    assert f'from_pretrained("model_cards/real_text/{name}")' in card.text


@pytest.mark.parametrize("name", RUNS)
def test_the_snippet_of_a_card_runs(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(snippet, {})
    assert re.search(r"Once upon a time\W+\w+", capsys.readouterr().out)
