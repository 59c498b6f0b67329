"""synthetic.py keeps the weights that do best at a longer length."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import synthetic
import torch
from safetensors.torch import load_file
from synthetic_model import build_model
from synthetic_report import samples_seen
from synthetic_selection import Selection
from synthetic_training import Progress, Trainer, train
from test_synthetic_run import options, run
from transformers import AutoModelForCausalLM

from hf_sparse_attention.evaluation.synthetic import Cell, LadderOptions, measure
from hf_sparse_attention.training import get_alpha

CHANGES = {"max_steps": 120, "logging_steps": 20, "validation_multiple": 2, "validation_steps": 40}


def trainer_of(**changes):
    task_options, train_options, _ = options(**changes)
    return Trainer(build_model(task_options), task_options.trained_task(), train_options, torch.device("cpu"))


def scripted(monkeypatch, scores):
    """``measure`` sees these pairs of exact match and token accuracy, one after another."""
    scores = iter(scores)

    def seen(model, task, length, ladder):
        exact, tokens = next(scores)
        return Cell(length, 0, 1, exact, 0.0, 1.0, tokens, 0, 0, 0, 0.0)

    monkeypatch.setattr("synthetic_selection.measure", seen)


def run_until_measured(output):
    """A run that is killed as its evaluation begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "evaluate", lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(output, **CHANGES, samples=0)


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([(0.1, 0.9), (0.3, 0.8), (0.2, 0.95)], 2),
        ([(0.0, 0.5), (0.0, 0.7), (0.0, 0.6)], 2),
        ([(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], 3),
        ([(1.0, 1.0), (1.0, 1.0), (0.9, 1.0)], 2),
    ],
    ids=["rows", "tokens where no row is right", "nothing right", "everything right"],
)
def test_the_best_weights_are_kept_and_of_equals_the_later(scores, kept, monkeypatch):
    scripted(monkeypatch, scores)
    trainer = trainer_of()
    selection = Selection(trainer.task, 24, LadderOptions(samples=8))
    for step in (1, 2, 3):
        with torch.no_grad():
            trainer.model.lm_head.weight.fill_(step)
        assert selection.look(trainer, step) == scores[step - 1]
    assert selection.step == kept
    selection.apply(trainer.model)
    assert (trainer.model.lm_head.weight == kept).all()
    assert selection.curve["step"] == [1, 2, 3]


def test_looking_changes_no_step_and_is_no_training_time():
    losses = []
    for looks in (False, True):
        torch.manual_seed(0)
        trainer = trainer_of()
        trainer.set_lengths(4, 12)
        trainer.set_rate(1.0)
        selection = Selection(trainer.task, 24, LadderOptions(samples=8))
        for step in range(4):
            trainer.steps(12)
            if looks:
                selection.look(trainer, step)
        losses.append(trainer.read())
        assert (trainer.aside > 0) is looks
        assert trainer.model.training
    assert losses[0] == losses[1]


def test_the_saved_model_is_the_selected_one(tmp_path):
    results = run(tmp_path / "out", **CHANGES, samples=50)
    selection = results["training"]["selection"]
    assert selection["length"] == 24
    assert selection["step"] == [40, 80, 120]
    best = selection["step"].index(selection["kept_step"])
    pairs = list(zip(selection["exact_match"], selection["token_accuracy"]))
    assert pairs[best] == max(pairs)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    task = options()[0].evaluated_task()
    again = measure(model, task, 24, LadderOptions(samples=500, generate=0, seed=3))
    assert (again.exact_match, again.token_accuracy) == pairs[best]


def test_saved_weights_are_those_of_the_kept_step(tmp_path, monkeypatch):
    weights = {}
    for kept, scores in ((40, [(1.0, 1.0), (0.5, 1.0), (0.5, 1.0)]), (120, [(0.5, 1.0), (0.5, 1.0), (1.0, 1.0)])):
        scripted(monkeypatch, scores)
        output = tmp_path / str(kept)
        results = run(output, **CHANGES, samples=0)
        assert results["training"]["selection"]["kept_step"] == kept
        weights[kept] = load_file(output / "model.safetensors")["lm_head.weight"]
        assert f"of step {kept}, best at 24 tokens" in (output / "README.md").read_text(encoding="utf-8")
        assert samples_seen(results) == kept * 64
    assert not torch.allclose(weights[40], weights[120], atol=1e-3)
    short = run(tmp_path / "short", **{**CHANGES, "validation_multiple": 0}, samples=0)
    assert torch.equal(load_file(tmp_path / "short" / "model.safetensors")["lm_head.weight"], weights[120])
    assert "selection" not in short["training"]


def test_no_look_before_alpha_is_what_it_will_be(tmp_path, monkeypatch):
    seen = []
    look = Selection.look
    monkeypatch.setattr(
        Selection,
        "look",
        lambda self, trainer, step: (seen.append(get_alpha(trainer.model)), look(self, trainer, step))[1],
    )
    results = run(tmp_path / "ramp", **CHANGES, samples=0, alpha_share=0.5, alpha_stages=4)
    assert results["training"]["selection"]["step"] == [80, 120]
    results = run(tmp_path / "to the end", **CHANGES, samples=0, alpha_share=1.0)
    assert results["training"]["selection"]["step"] == [120]
    assert seen == [1.5] * 3


def test_every_row_of_a_long_look_is_drawn():
    task_options, train_options, eval_options = options(validation_multiple=1000, validation_samples=70)
    ladder = synthetic.make_selection(task_options, train_options, eval_options).ladder
    assert ladder.count(12000) == 70


def test_words_of_a_look_are_none_of_the_test():
    task_options, _, _ = options(task="mqmtar", task_options={"words": 50}, train_lengths=[16, 32])
    seeds = {task.pool_seed for task in (task_options.trained_task(), task_options.evaluated_task())}
    assert task_options.validated_task().pool_seed not in seeds


@pytest.mark.parametrize(
    "changes", [{"validation_multiple": 3}, {"validation_multiple": 0}, {"validation_samples": 7}], ids=str
)
def test_a_run_goes_on_with_comparable_looks_only(tmp_path, capsys, changes):
    run_until_measured(tmp_path / "cut")
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", **{**CHANGES, **changes}, samples=0, resume="latest")
    assert "validation is" in capsys.readouterr().err


def test_a_resumed_run_knows_what_it_has_seen(tmp_path):
    whole = run(tmp_path / "whole", **CHANGES, samples=0)
    run_until_measured(tmp_path / "cut")
    resumed = run(tmp_path / "cut", **CHANGES, samples=0, resume="latest")
    assert resumed["training"]["selection"] == whole["training"]["selection"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_time_of_looks_is_not_that_of_the_training(tmp_path):
    trainer = trainer_of(max_steps=20, logging_steps=5)
    seconds = []
    for line in train(trainer, Progress(trainer.options), tmp_path / "log", SimpleNamespace(number=None)):
        seconds.append(line["seconds"])
        trainer.aside += 1000.0
    assert seconds[0] > -1
    assert all(later < earlier - 900 for earlier, later in itertools.pairwise(seconds))
