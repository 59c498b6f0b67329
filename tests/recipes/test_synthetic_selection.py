"""synthetic.py keeps the weights that do best at a longer length, and trains in the precision it is asked for."""

import sys

import pytest
import synthetic
import torch
from safetensors.torch import load_file
from synthetic_model import build_model
from synthetic_selection import Selection
from synthetic_training import Trainer
from test_synthetic_run import options, run
from transformers import AutoModelForCausalLM

from hf_sparse_attention.evaluation.synthetic import Cell, LadderOptions, measure

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


def test_a_resumed_run_knows_what_it_has_seen(tmp_path):
    whole = run(tmp_path / "whole", **CHANGES, samples=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "evaluate", lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(tmp_path / "cut", **CHANGES, samples=0)
    resumed = run(tmp_path / "cut", **CHANGES, samples=0, resume="latest")
    assert resumed["training"]["selection"] == whole["training"]["selection"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_weights_are_trained_in_bfloat16(tmp_path):
    results = run(tmp_path / "out", mixed_precision="bf16-true", max_steps=200)
    assert results["training"]["curve"]["loss"][-1] < 1 < results["training"]["curve"]["loss"][0]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())


def test_a_validation_length_below_the_task_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", task="mqmtar", train_lengths=[8, 16], validation_multiple=0.1)
    assert "validation_multiple" in capsys.readouterr().err
