"""The trained models that the repository holds: they load, and do what their cards say."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from synthetic_options import TaskOptions
from transformers import AutoModelForCausalLM

from hf_sparse_attention.data.synthetic import make_task
from hf_sparse_attention.evaluation.synthetic import LadderOptions, measure

FOLDER = Path(__file__).parents[2] / "model_cards" / "synthetic"
# The length at which each is asked, as a multiple of that of its training.
MULTIPLES = {"copy": 16, "mqmtar": 4, "sort": 2}


def test_every_model_is_asked():
    assert {path.parent.name for path in FOLDER.glob("*/config.json")} == set(MULTIPLES)
    assert sum(path.stat().st_size for path in FOLDER.glob("*/model.safetensors")) < 20 * 2**20


@pytest.mark.parametrize("name", MULTIPLES)
def test_a_kept_model_solves_ten_samples(name):
    results = json.loads((FOLDER / name / "results.json").read_text(encoding="utf-8"))
    settings, evaluation = results["run"]["settings"], results["evaluation"]
    fields = {"task": settings["task"], "task_options": settings["task_options"]}
    task = TaskOptions(**fields).evaluated_task()
    assert task == make_task(settings["task"], **evaluation["task"])
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype="float32").eval()
    length = MULTIPLES[name] * results["train_lengths"][1]
    assert measure(model, task, length, LadderOptions(samples=10, seed=2, generate=0)).exact_match == 1
    short = measure(model, task, results["train_lengths"][1], LadderOptions(samples=2, seed=2, generate=2))
    assert short.generated_exact == short.generated_agree == short.generated == 2


@pytest.mark.parametrize("name", MULTIPLES)
def test_a_card_has_the_numbers_of_its_run(name):
    results = json.loads((FOLDER / name / "results.json").read_text(encoding="utf-8"))
    card = ModelCard.load(FOLDER / name / "README.md")
    shown = {entry.dataset_type: entry.metric_value for entry in card.data.eval_results}
    cells = results["evaluation"]["cells"]
    assert shown == {f"synthetic-{results['task']}-{cell['length']}": cell["exact_match"] for cell in cells}
    assert f"| samples | {results['training']['samples']:,} |" in card.text
