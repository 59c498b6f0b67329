"""synthetic.py trains, measures what it keeps, and survives signals and bad options."""

import contextlib
import json
import math
import os
import signal
import sys
import time

import pytest
import synthetic
import torch
from safetensors.torch import load_file
from synthetic_model import build_model, fused_norms, last_hidden_states, target_loss
from synthetic_options import EvalOptions, TaskOptions, TrainOptions
from synthetic_training import Progress, Trainer, train
from tiny_run import as_flags
from transformers import AutoModelForCausalLM, set_seed

from hf_sparse_attention.arguments import ArgumentError, parse
from hf_sparse_attention.evaluation import synthetic as evaluation
from hf_sparse_attention.evaluation.synthetic import LadderOptions, check_generation, measure
from hf_sparse_attention.training import get_alpha

TINY = {
    "task": "n_back",
    "attn_implementation": "asentmax",
    "sparse_attention": {"position_encoding": "nape"},
    "layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "heads": 4,
    "train_lengths": [4, 12],
    "batch_size": 64,
    "max_steps": 500,
    "learning_rate": 1e-2,
    "warmup_steps": 20,
    "logging_steps": 20,
    "mixed_precision": "no",
    "multiples": [1, 2, 4],
    "samples": 100,
}


def run(output, **changes):
    synthetic.main(as_flags({**TINY, "output_dir": str(output), **changes}))
    return read(output)


def read(output):
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def options(**changes):
    flags = as_flags({**TINY, "output_dir": "unused", **changes})
    return parse(TaskOptions, TrainOptions, EvalOptions, argv=flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("synthetic") / "n_back"
    return output, run(output)


def test_it_learns(trained):
    _, results = trained
    assert results["status"] == "finished"
    cells = results["evaluation"]["cells"]
    assert [cell["length"] for cell in cells] == [12, 24, 48]
    assert cells[0]["exact_match"] >= 0.95
    assert all(cell["low"] <= cell["exact_match"] <= cell["high"] for cell in cells)
    curve = results["training"]["curve"]
    assert curve["step"] == list(range(20, 501, 20))
    assert curve["loss"][-1] < 0.1 < 2 < curve["loss"][0]


def test_results_say_how_they_were_made(trained):
    output, results = trained
    assert results["training"]["steps"] == 500
    assert results["training"]["samples"] == 500 * 64
    assert results["training"]["seconds"] > 0
    assert results["run"]["settings"]["seed"] == 0
    assert {"torch", "transformers", "hf_sparse_attention"} <= set(results["run"]["versions"])
    assert results["run"]["command"].startswith("python ")
    assert results["evaluation"]["protocol"]["samples"] == 100
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 25
    assert not list(output.glob("checkpoint-*"))


def test_the_saved_model_scores_the_same(trained):
    output, results = trained
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    task = options()[0].evaluated_task()
    for stored in results["evaluation"]["cells"]:
        cell = measure(model, task, stored["length"], LadderOptions(samples=100))
        assert (cell.exact_match, cell.token_accuracy) == (stored["exact_match"], stored["token_accuracy"])


def test_the_card_has_the_numbers(trained):
    output, results = trained
    card = (output / "README.md").read_text(encoding="utf-8")
    assert 'make_task("n_back")' in card
    for cell in results["evaluation"]["cells"]:
        assert f"source of {cell['length']} tokens, 100 samples" in card
        assert f"{cell['exact_match']:.4g}" in card


def test_a_saved_model_is_measured_and_trained_on(trained, tmp_path):
    output, results = trained
    again = run(tmp_path / "measured", init_from=str(output), max_steps=0, save_model=False, samples=100)
    without_time = [{k: v for k, v in c.items() if k != "seconds"} for c in again["evaluation"]["cells"]]
    assert without_time == [{k: v for k, v in c.items() if k != "seconds"} for c in results["evaluation"]["cells"]]
    assert again["training"]["samples"] == 0
    further = run(tmp_path / "further", init_from=str(output), max_steps=20, samples=0, learning_rate=1e-4)
    assert further["training"]["curve"]["loss"][0] < 0.2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, ["hidden_size", "32", "64"]),
        ({"architecture": "gemma2"}, ["model_type", "llama", "gemma2"]),
        ({"attn_implementation": "entmax"}, ["preset", "asentmax", "entmax"]),
        ({"sparse_attention": {"position_encoding": "nope"}}, ["position_encoding", "nape", "nope"]),
        ({"task": "copy"}, ["vocab_size", "20", "36"]),
        ({"init_from": "nowhere"}, ["nowhere"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_saved_model_must_fit(trained, tmp_path, capsys, changes, words):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", **{"init_from": str(trained[0]), **changes})
    said = capsys.readouterr().err
    assert all(word in said for word in ["init_from", *words])


def test_bfloat16_weights_score_what_was_measured(tmp_path):
    results = run(tmp_path / "out", max_steps=200, save_dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert model.dtype == torch.float32
    cell = measure(model, options()[0].evaluated_task(), 12, LadderOptions(samples=100))
    assert cell.exact_match == results["evaluation"]["cells"][0]["exact_match"]


@pytest.mark.parametrize("preset", ["asentmax", "ssmax"])
def test_one_forward_pass_decides_as_generation_does(preset, tmp_path):
    """After a short training about half of the bits are right, so that both answers occur."""
    changes = {"task": "flip_flop", "attn_implementation": preset, "train_lengths": [4, 13], "max_steps": 60}
    results = run(tmp_path / preset, generate=8, **changes)
    assert all(cell["generated"] == cell["generated_agree"] == 8 for cell in results["evaluation"]["cells"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / preset).eval()
    generated, right, agree = check_generation(
        model, options(**changes)[0].evaluated_task(), 40, LadderOptions(generate=48)
    )
    assert generated == agree == 48
    assert 0 < right < 48


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("encoding", ["nape", "model"])
@pytest.mark.parametrize("preset", ["softmax", "ssmax", "entmax", "asentmax"])
def test_the_step_computes_what_the_model_computes(preset, encoding, architecture):
    attention = {"attn_implementation": preset, "sparse_attention": {"position_encoding": encoding}}
    task_options = options(task="sort", architecture=architecture, layers=2, **attention)[0]
    model, task = build_model(task_options), task_options.trained_task()
    samples = task.sample(5, (3, 17), torch.Generator().manual_seed(0))
    expected = model(input_ids=samples.input_ids, labels=samples.labels, use_cache=False)
    hidden = model.model(samples.input_ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(last_hidden_states(model, samples.input_ids), hidden, rtol=0, atol=0)
    loss, exact = target_loss(model, *samples, task.label_tokens(17))
    torch.testing.assert_close(loss, expected.loss)
    assert exact == 0


@pytest.mark.parametrize(
    ("architecture", "norms", "kinds"),
    [("llama", 5, ("LlamaRMSNorm", "_FusedNorm")), ("gemma2", 9, ("Gemma2RMSNorm", "_FusedGemmaNorm"))],
    ids=["llama", "gemma2"],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_fused_norms_compute_the_same(autocast, architecture, norms, kinds):
    task_options = options(task="sort", architecture=architecture, layers=2)[0]
    model, task = build_model(task_options), task_options.trained_task()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    samples = task.sample(5, (3, 17), torch.Generator().manual_seed(0))
    results = []
    for context in (contextlib.nullcontext(), fused_norms(model)):
        model.zero_grad()
        with context, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = target_loss(model, *samples, task.label_tokens(17))[0]
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    tolerance = {"rtol": 1e-2, "atol": 2e-3} if autocast else {}
    torch.testing.assert_close(results[1], results[0], **tolerance)
    with fused_norms(model):
        inside = [type(module).__name__ for module in model.modules()]
    after = [type(module).__name__ for module in model.modules()]
    own, fused = kinds
    assert (inside.count(fused), after.count(own), after.count(fused)) == (norms, norms, 0)


def test_initial_embeddings_have_the_range_that_is_asked_for():
    weights = {}
    for embedding_range in (None, 0.5):
        set_seed(0)
        model = build_model(options(hidden_size=64, embedding_range=embedding_range)[0])
        weights[embedding_range] = {name: tensor.detach() for name, tensor in model.named_parameters()}
    embeddings = {name: w.pop("model.embed_tokens.weight") for name, w in weights.items()}
    torch.testing.assert_close(embeddings[0.5], 25 * embeddings[None])
    assert embeddings[0.5].std().item() == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(weights[0.5], weights[None], rtol=0, atol=0)


def test_same_seed_same_losses(tmp_path):
    curves = [
        run(tmp_path / str(i), max_steps=40, samples=0, seed=seed)["training"]["curve"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert curves[0]["loss"] == curves[1]["loss"] != curves[2]["loss"]


def test_the_clock_ends_training(tmp_path):
    began = time.monotonic()
    results = run(tmp_path / "out", max_steps=None, max_seconds=1.5, logging_steps=5, samples=0)
    assert 1.5 <= results["training"]["seconds"] < 3
    assert time.monotonic() - began < 10
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    # The cosine has come to its end at the same time.
    assert lines[-1]["learning_rate"] < 1e-5
    assert max(line["learning_rate"] for line in lines) > 5e-3


def test_a_signal_saves_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    changes = {"max_steps": 60, "samples": 0, "logging_steps": 10}
    undisturbed = run(tmp_path / "whole", **changes)
    output, steps, calls = tmp_path / "stopped", Trainer.steps, []

    def interrupted(trainer, limit):
        calls.append(1)
        if len(calls) == 34:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(trainer, limit)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "steps", interrupted)
        with pytest.raises(SystemExit) as leaving:
            run(output, **changes)
    assert leaving.value.code == 128 + signal.SIGTERM
    assert "--resume latest" in capsys.readouterr().out
    stopped = read(output)
    assert stopped["status"] == f"stopped: signal {signal.SIGTERM}"
    assert stopped["training"]["steps"] == 34
    with pytest.raises(SystemExit):
        run(output, **changes)
    resumed = run(output, resume="latest", **changes)
    assert resumed["status"] == "finished"
    assert resumed["training"]["steps"] == 60
    torch.testing.assert_close(resumed["training"]["curve"]["loss"][-1], undisturbed["training"]["curve"]["loss"][-1])


def test_an_interrupted_evaluation_goes_on(trained, tmp_path, monkeypatch, capsys):
    """Training is not repeated, and a finished run is left alone."""
    changes = {"init_from": str(trained[0]), "max_steps": 20, "learning_rate": 1e-4, "multiples": [1, 2]}
    with monkeypatch.context() as patch:
        measured = evaluation.measure
        patch.setattr(evaluation, "measure", lambda *args: measured(*args) if args[2] == 12 else sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(tmp_path / "out", **changes)
    cut = read(tmp_path / "out")
    assert cut["status"] == "trained"
    assert [cell["length"] for cell in cut["evaluation"]["cells"]] == [12]
    curve = (tmp_path / "out" / "metrics.jsonl").read_text()
    results = run(tmp_path / "out", resume="latest", **changes)
    assert results["status"] == "finished"
    assert results["evaluation"]["cells"][0]["token_accuracy"] == cut["evaluation"]["cells"][0]["token_accuracy"]
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == curve
    run(tmp_path / "out", resume="latest", **changes)
    assert "nothing to do" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", learning_rate=1e30, max_grad_norm=1e30)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "the loss is nan between steps" in said
    assert "learning_rate" in said
    assert read(tmp_path / "out")["status"].startswith("stopped: the loss is nan")


def test_curriculum_and_alpha_reach_the_step():
    task_options, train_options, _ = options(
        task="copy", max_steps=8, curriculum=0.5, curriculum_length=5, train_lengths=[3, 13], alpha_share=0.5,
        alpha_stages=2, logging_steps=1, pad_multiple=4,
    )  # fmt: skip
    set_seed(0)
    trainer = Trainer(build_model(task_options), task_options.trained_task(), train_options, torch.device("cpu"))
    limits = []
    step = trainer.steps
    trainer.steps = lambda limit: (limits.append(limit), step(limit))[1]

    class Never:
        number = None

    lines = list(train(trainer, Progress(train_options), log=os.devnull, stop=Never))
    assert [line["longest"] for line in lines] == [5, 7, 9, 11, 13, 13, 13, 13]
    assert [line["alpha"] for line in lines] == [1.0, 1.0, 1.25, 1.25, 1.5, 1.5, 1.5, 1.5]
    assert limits == [8, 8, 12, 12, 13, 13, 13, 13]


STAGED = {
    "task": "mqmtar",
    "train_task_options": {"density": [0.1, 0.9], "words": 64},
    "stages": {"queries": [1, [1, 2], 3], "gaps": ["slots", "anywhere", "slots"]},
    "stage_lengths": [8, 13, 20],
    "train_lengths": [6, 20],
    "pad_multiple": 4,
    "max_steps": 6,
    "logging_steps": 1,
}


def test_stages_follow_what_is_right():
    """Each stage has its options and its longest source, and ends after a line that reaches stage_exact."""
    task_options, train_options, _ = options(**STAGED, stage_exact=0.75)
    trainer = Trainer(build_model(task_options), task_options.trained_tasks(), train_options, torch.device("cpu"))
    seen = []
    trainer.steps = lambda limit: (seen.append((trainer.task.queries, trainer.task.gaps, limit)), 1)[1]
    right = iter([0.5, 0.75, 0.1, 0.8, 1.0, 0.3])
    trainer.read = lambda: [1.0, next(right), 1.0]

    class Never:
        number = None

    lines = list(train(trainer, Progress(train_options), log=os.devnull, stop=Never))
    assert [line["stage"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert [line["longest"] for line in lines] == [8, 8, 13, 13, 20, 20]
    first, second, third = (1, "slots", 8), ((1, 2), "anywhere", 16), (3, "slots", 20)
    assert seen == [first, first, second, second, third, third]


def test_a_resumed_run_is_in_its_stage(tmp_path):
    changes = {**STAGED, "stage_exact": 0.0, "samples": 0, "save_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "evaluate", lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(tmp_path / "out", **{**changes, "max_steps": 2})
    results = run(tmp_path / "out", resume="latest", **changes)
    assert results["training"]["curve"]["stage"] == [0, 1, 2, 2, 2, 2]
    assert results["training"]["curve"]["longest"] == [8, 13, 20, 20, 20, 20]


def test_alpha_arrives_however_long_it_takes():
    task_options, train_options, _ = options(max_steps=5, alpha_share=1.0, alpha_stages=2, logging_steps=1)
    model = build_model(task_options)
    trainer = Trainer(model, task_options.trained_task(), train_options, torch.device("cpu"))

    class Never:
        number = None

    alphas = [line["alpha"] for line in train(trainer, Progress(train_options), log=os.devnull, stop=Never)]
    assert alphas == [1.0, 1.0, 1.0, 1.25, 1.25]
    assert get_alpha(model) == 1.5


def test_learning_rate_by_steps_and_by_the_clock():
    _, train_options, _ = options(max_steps=100, warmup_steps=10, final_learning_rate=0.1)
    rates = [Progress(train_options, step).rate() for step in range(101)]
    assert rates[:10] == [(i + 1) / 10 for i in range(10)]
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    train_options.max_steps, train_options.max_seconds = None, 40.0
    assert Progress(train_options, 10**6, seconds=25.0, warm_seconds=10.0).rate() == pytest.approx(0.55)
    assert Progress(train_options, 5, seconds=25.0).rate() == 0.6
    train_options.max_steps = 100
    assert Progress(train_options, 99, seconds=0.0).share() == 0.99
    assert Progress(train_options, 1, seconds=39.0).share() == pytest.approx(39 / 40)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "sorting"}, ["sorting", "sort"]),
        ({"task": None}, ["task", "mqmtar"]),
        ({"task_options": {"alphbet": 3}}, ["alphbet", "alphabet"]),
        ({"train_task_options": {"alphabet": 9}}, ["train_task_options", "vocabulary"]),
        ({"attn_implementation": "sdpa"}, ["attn_implementation", "sdpa", "asentmax"]),
        ({"sparse_attention": {"position_encodin": "nape"}}, ["position_encodin", "position_encoding"]),
        ({"architecture": "gemma"}, ["architecture", "gemma2"]),
        ({"hidden_size": 36, "heads": 8}, ["hidden_size", "36"]),
        ({"max_steps": None}, ["max_steps", "max_seconds"]),
        ({"train_lengths": [9, 4]}, ["train_lengths"]),
        ({"mixed_precision": "fp16"}, ["mixed_precision", "bf16"]),
        ({"validation_multiple": -1.0}, ["validation_multiple", "-1.0"]),
        ({"validation_multiple": 0.5}, ["validation_multiple", "0.5"]),
        ({"validation_samples": 0}, ["validation_samples", "0"]),
        ({"curriculum": 1.5}, ["curriculum", "1.5"]),
        ({"start_dropout": -0.5}, ["start_dropout", "-0.5"]),
        ({"start_dropout": 1.0}, ["start_dropout", "1.0"]),
        ({"stages": {"alphabet": 9}}, ["stages", "list"]),
        ({"stages": {"steps": [1, 2], "alphabet": [16]}}, ["stages", "list"]),
        ({"stages": {"alphabet": [9, 16]}}, ["stages", "vocabulary"]),
        ({"stages": {"alphbet": [9, 16]}}, ["alphbet"]),
        ({"stage_exact": 2.0}, ["stage_exact", "2.0"]),
        ({"embedding_range": 0.0}, ["embedding_range", "0.0"]),
        ({"task": "mqmtar", "train_task_options": {"queries": 0}}, ["queries", "0"]),
        ({"save_dtype": "int8"}, ["save_dtype", "bfloat16"]),
        ({"output_dir": None}, ["output_dir"]),
        ({"multiples": [1.0, math.inf]}, ["multiples", "inf"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(changes, words):
    with pytest.raises(ArgumentError) as error:
        options(**changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("lengths", [[8], [8, 40], [2, 20]], ids=str)
def test_lengths_of_stages_that_do_not_fit_are_refused(lengths, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", **{**STAGED, "stages": {"queries": [1, 2]}, "stage_lengths": lengths})
    assert "stage_lengths is" in capsys.readouterr().err


def test_lengths_below_the_task_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", task="mqmtar", train_lengths=[3, 64])
    assert "length is 3" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_nothing_is_compiled_on_a_cpu():
    """The short configs ask for it, and a CPU may have no compiler."""
    task_options, train_options, _ = options(compile=True)
    trainer = Trainer(build_model(task_options), task_options.trained_task(), train_options, torch.device("cpu"))
    assert train_options.compile
    assert trainer.compiled is None


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["asentmax", "softmax"])
def test_captured_steps_train_as_eager_ones(preset):
    losses = {}
    for captured in (False, True):
        task_options, train_options, _ = options(
            task="mqmtar", attn_implementation=preset, train_lengths=[16, 64], cuda_graph=captured,
            mixed_precision="bf16", hidden_size=64,
        )  # fmt: skip
        set_seed(0)
        trainer = Trainer(
            build_model(task_options).cuda(), task_options.trained_task(), train_options, torch.device("cuda")
        )
        trainer.set_lengths(16, 64)
        trainer.set_rate(0.1)
        steps, values = 0, []
        while steps < 30:
            done = trainer.steps(64)
            steps += done
            values.append(trainer.read()[0] / done)
        losses[captured] = values[-1]
        assert bool(trainer.graphs) is captured
    assert math.isfinite(losses[True])
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
