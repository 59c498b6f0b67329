"""Training runs of pretrain.py in this process: what they write, and that interrupted ones end as undisturbed ones."""

import json
import math
import os
import re
import signal

import pretrain as recipe
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import TINY_MODEL, copy_until, read_metrics, same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention.checkpoints import list_checkpoints, locked_folder
from hf_sparse_attention.training import get_alpha


def test_what_a_run_writes(trained, text_file):
    metrics = read_metrics(trained)
    assert [line["step"] for line in metrics] == list(range(1, 11))
    assert metrics[0]["loss"] == pytest.approx(math.log(300), rel=0.02)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.3
    assert metrics[-1]["tokens"] == 10 * 4 * 33
    assert {"learning_rate", "grad_norm"} <= set(metrics[0])
    speed = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert speed["tokens_per_second"] > 0
    assert speed["memory_gb"] > 0
    assert [path.name for path in list_checkpoints(trained)] == [f"checkpoint-{n:08d}" for n in (3, 6, 9, 10)]

    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.config._attn_implementation == "asentmax"
    assert model.config.sparse_attention["position_encoding"] == "nape"
    assert model.config.max_position_embeddings == 33
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    card = (trained / "README.md").read_text()
    assert "ASEntmax attention" in card
    assert f"| data | {text_file.name} |" in card
    assert "| tokens | 1320 |" in card


def test_snippet_of_the_card_runs(trained):
    snippet = (trained / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert str(trained) in snippet
    exec(snippet, {})


@pytest.mark.parametrize("step", [3, 9, 10])
def test_resume(pretrain, trained, tmp_path, capsys, step):
    output = copy_until(trained, tmp_path / "run", step)
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # cut short by a kill
    (output / ".checkpoint-00000012.tmp").mkdir()
    pretrain(output, resume="latest", keep_checkpoints=9)
    assert read_metrics(output) == read_metrics(trained)
    assert same_weights(output, trained)
    if step == 3:
        assert not list(output.glob(".checkpoint*"))
    *_, names, _, numbers, _, written = capsys.readouterr().out.splitlines()
    summary = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (names, numbers)), strict=True))
    loss = [line["loss"] for line in read_metrics(trained) if "loss" in line][-1]
    assert (summary["steps"], summary["tokens"]) == ("10", "1,320")
    assert summary["last training loss"] == f"{loss:.4f}"
    assert written == f"Written to {output}"


def test_resume_from_another_folder(pretrain, trained, tmp_path):
    before = sorted(path.name for path in trained.iterdir())
    pretrain(tmp_path / "run", resume=str(trained / "checkpoint-00000006"), keep_checkpoints=9)
    assert read_metrics(tmp_path / "run") == [line for line in read_metrics(trained) if line["step"] > 6]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-00000009", "checkpoint-00000010"]
    assert same_weights(tmp_path / "run", trained)
    assert sorted(path.name for path in trained.iterdir()) == before


OTHER_MODELS = {
    "width": ({"model_overrides": {**TINY_MODEL, "hidden_size": 64}}, "hidden_size is 64, not 32"),
    "depth": ({"model_overrides": {**TINY_MODEL, "num_hidden_layers": 3}}, "num_hidden_layers is 3, not 2"),
    # The weights of these would fit.
    "norm": ({"model_overrides": {**TINY_MODEL, "rms_norm_eps": 0.01}}, "rms_norm_eps is 0.01, not 1e-06"),
    "preset": ({"attn_implementation": "entmax"}, "attn_implementation is 'entmax', not 'asentmax'"),
    "alpha": (
        {"sparse_attention": {"position_encoding": "nape", "alpha": 1.75}},
        "sparse_attention.alpha is 1.75, not 1.5",
    ),
    "positions": (
        {"sparse_attention": {"position_encoding": "nope"}},
        "sparse_attention.position_encoding is 'nope', not 'nape'",
    ),
    "tokenizer": ({"tokenizer": "elsewhere"}, "tokenizer is 'elsewhere', not None"),
    "length": ({"length": 34}, "the saved data position has length 33, this run has 34"),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_a_run_does_not_go_on_with_another_model(pretrain, trained, tmp_path, capsys, changes, message):
    output = copy_until(trained, tmp_path / "run", 9)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as leaving:
        pretrain(output, resume="latest", **changes)
    assert leaving.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pretrain.py: error: ")
    assert message in error
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_other_options_of_training(pretrain, trained, tmp_path):
    output = copy_until(trained, tmp_path / "run", 6)
    changes = {"learning_rate": 5e-3, "weight_decay": 0.3, "max_steps": 8, "gradient_checkpointing": True}
    other_backend = {"position_encoding": "nape", "backend": "reference"}
    pretrain(output, resume="latest", sparse_attention=other_backend, **changes)
    metrics, undisturbed = read_metrics(output), read_metrics(trained)
    assert metrics[:6] == undisturbed[:6]
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert metrics[6]["loss"] == pytest.approx(undisturbed[6]["loss"], abs=1e-5)
    assert metrics[6]["learning_rate"] < 0.6 * undisturbed[6]["learning_rate"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signal_saves_and_leaves(pretrain, trained, tmp_path, monkeypatch, number):
    calls = []
    original = recipe.forward_backward

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return original(*args)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(recipe, "forward_backward", interrupted)
    with pytest.raises(SystemExit) as leaving:
        pretrain(tmp_path / "run")
    assert leaving.value.code == 128 + number
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-00000005"
    assert not (tmp_path / "run" / "model.safetensors").exists()
    pretrain(tmp_path / "run", resume="latest")
    assert read_metrics(tmp_path / "run") == read_metrics(trained)
    assert same_weights(tmp_path / "run", trained)


def test_non_finite_loss_stops(pretrain, tmp_path, capsys):
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as leaving:
        pretrain(output, learning_rate=1e30, warmup_steps=0, save_steps=1)
    assert leaving.value.code == 1
    message = capsys.readouterr().err
    step = int(re.search(r"error: step (\d+): loss \S+, gradient norm (nan|inf)", message)[1])
    assert str(output / f"nonfinite-{step:08d}") in message
    state = json.loads((output / f"nonfinite-{step:08d}" / "training_state.json").read_text())
    assert state["step"] == step - 1
    assert (output / f"nonfinite-{step:08d}" / "model.safetensors").exists()
    assert list_checkpoints(output)[-1].name == f"checkpoint-{step - 1:08d}"
    assert not (output / "model.safetensors").exists()


def spoil_gradient(monkeypatch, step, value):
    """The gradient of the step-th pass from now on has ``value`` in it; returns what grows with each pass."""
    original = recipe.forward_backward
    calls = []

    def diverging(accelerator, model, *args):
        calls.append(1)
        loss = original(accelerator, model, *args)
        if len(calls) == step:
            next(model.parameters()).grad[0, 0] = value
        return loss

    monkeypatch.setattr(recipe, "forward_backward", diverging)
    return calls


def test_non_finite_gradient_keeps_the_last_good_state(pretrain, tmp_path, capsys, monkeypatch):
    spoil_gradient(monkeypatch, 8, math.inf)
    with pytest.raises(SystemExit):
        pretrain(tmp_path / "run")
    assert re.search("step 8: loss [0-9.]+, gradient norm (inf|nan)", capsys.readouterr().err)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-00000003", "checkpoint-00000006"]


def test_non_finite_values_that_are_read_late_change_nothing(pretrain, trained, tmp_path, capsys, monkeypatch):
    original = recipe.forward_backward
    calls = spoil_gradient(monkeypatch, 4, math.nan)
    with pytest.raises(SystemExit):
        pretrain(tmp_path / "run", logging_steps=8, save_steps=0)
    assert len(calls) == 8
    assert re.search("error: step 4: loss [0-9.]+, gradient norm nan", capsys.readouterr().err)
    before, good = tmp_path / "run" / "nonfinite-00000004", trained / "checkpoint-00000003"
    kept = [load_file(folder / "model.safetensors") for folder in (before, good)]
    assert all(torch.equal(kept[0][name], tensor) for name, tensor in kept[1].items())
    states = [json.loads((folder / "training_state.json").read_text()) for folder in (before, good)]
    assert states[0]["data"] == states[1]["data"]
    assert [state["step"] for state in states] == [3, 3]
    # The state goes on as the undisturbed run did, the losses of its first steps included.
    monkeypatch.setattr(recipe, "forward_backward", original)
    pretrain(tmp_path / "run", resume="nonfinite-00000004", logging_steps=10, save_steps=0)
    losses = [line["loss"] for line in read_metrics(trained)]
    assert read_metrics(tmp_path / "run")[-1]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_accumulation_gives_the_same_losses(pretrain, trained, tmp_path):
    whole = read_metrics(pretrain(tmp_path / "run", device_batch_size=4, save_steps=0, max_steps=6, warmup_steps=2))
    parts = read_metrics(trained)
    assert [line["loss"] for line in whole[:3]] == pytest.approx([line["loss"] for line in parts[:3]], abs=1e-5)
    assert whole[0]["grad_norm"] == pytest.approx(parts[0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("by_region", ["true", "false"])
def test_compiled_by_accelerate(pretrain, trained, tmp_path, monkeypatch, by_region):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", by_region)
    compiled = pretrain(tmp_path / "compiled", keep_checkpoints=9)
    resumed = pretrain(copy_until(compiled, tmp_path / "resumed", 6), resume="latest")
    torch._dynamo.reset()
    expected = [line["loss"] for line in read_metrics(trained)]
    assert [line["loss"] for line in read_metrics(compiled)] == pytest.approx(expected, rel=1e-4)
    assert weights(compiled).keys() == weights(trained).keys()
    assert same_weights(resumed, compiled)


def test_patching_with_an_alpha_schedule(pretrain, tmp_path):
    softmax = pretrain(
        tmp_path / "softmax", attn_implementation="sdpa", sparse_attention=None, max_steps=2, save_steps=0
    )
    assert AutoModelForCausalLM.from_pretrained(softmax).config._attn_implementation == "sdpa"
    patch = {
        "model_config": None,
        "model_overrides": None,
        "model_name_or_path": softmax,
        "sparse_attention": {"alpha": 1.75},
        "alpha_steps": 4,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-3,
    }
    output = pretrain(tmp_path / "patched", **patch, keep_checkpoints=9)
    metrics = read_metrics(output)
    assert [line["alpha"] for line in metrics] == pytest.approx([1, 1.1875, 1.375, 1.5625, 1.75, 1.75])
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config._attn_implementation == "asentmax"
    assert model.config.sparse_attention["alpha"] == 1.75
    assert "| alpha steps | 4 |" in (output / "README.md").read_text()

    again = copy_until(output, tmp_path / "again", 2)
    pretrain(again, **patch, resume="checkpoint-00000002", keep_checkpoints=9)
    assert read_metrics(again) == metrics


def test_what_is_validated_within_the_ramp_is_what_is_saved(pretrain, text_file, tmp_path, monkeypatch):
    measured = []
    original = recipe.evaluate
    monkeypatch.setattr(recipe, "evaluate", lambda *args: measured.append(get_alpha(args[1])) or original(*args))
    ramp = {"alpha_steps": 8, "max_steps": 4, "eval_steps": 2, "save_steps": 0, "validation_data": str(text_file)}
    output = pretrain(tmp_path / "run", **ramp)
    assert measured == [1.125, 1.25]
    assert AutoModelForCausalLM.from_pretrained(output).config.sparse_attention["alpha"] == 1.25
    assert [line["alpha"] for line in read_metrics(output) if "alpha" in line] == [1.0, 1.0625, 1.125, 1.1875]


def test_validation_precision_schedule_trackers_and_neox(pretrain, text_file, tmp_path, capsys, trained):
    changes = {
        "model_config": str(recipe.__file__).replace("pretrain.py", "configs/model/gpt_neox_1m.yaml"),
        "model_overrides": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2},
        "validation_data": str(text_file),
        "validation_rows": 61,
        "eval_steps": 2,
        "max_steps": 4,
        "schedule": "wsd",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "tokenizer": str(trained),
        "trackers": "tensorboard",
        "scale_lr_multiplier": 5,
        "max_grad_norm": 0,
        "logging_steps": 3,
    }
    output = pretrain(tmp_path / "run", **changes)
    metrics = read_metrics(output)
    assert [(line["step"], "eval_loss" in line) for line in metrics] == [(2, True), (3, False), (4, False), (4, True)]
    assert metrics[-1]["eval_labels"] < 61 * 32
    assert isinstance(metrics[-1]["eval_labels"], int)
    assert metrics[-1]["eval_perplexity"] == pytest.approx(math.exp(metrics[-1]["eval_loss"]))
    names, _, numbers = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert names.split("|")[-2].strip() == "validation perplexity"
    assert numbers.split("|")[-2].strip() == f"{metrics[-1]['eval_perplexity']:.4g}"
    assert f"| {text_file.name}, rows of 33 tokens | perplexity |" in (output / "README.md").read_text()
    assert list(output.rglob("events.out.tfevents.*"))
    assert (output / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()
    assert {tensor.dtype for tensor in weights(output).values()} == {torch.float32}


def test_streamed_text_with_retrieval_rows_resumes(pretrain, tmp_path):
    changes = {
        "streaming": True,
        "length": 64,
        "retrieval_fraction": 0.4,
        "retrieval_format": {"wording": "short", "number_digits": 2},
        "retrieval_tasks": ["s_niah_1", "s_niah_2"],
        "retrieval_weight": 2.5,
        "logging_steps": 4,
        "save_steps": 5,
    }
    whole = pretrain(tmp_path / "whole", **changes, keep_checkpoints=9)
    again = copy_until(whole, tmp_path / "again", 5)
    pretrain(again, **changes, resume="latest", keep_checkpoints=9)
    assert read_metrics(again) == read_metrics(whole)
    assert same_weights(again, whole)
    state = json.loads((whole / "checkpoint-00000010" / "training_state.json").read_text())["data"]
    assert state["drawn"] == 40
    assert 8 <= state["extra_drawn"] <= 24
    assert "| retrieval weight | 2.5 |" in (whole / "README.md").read_text()


def test_records_without_text_give_the_same_retrieval_rows(pretrain, documents, tmp_path):
    changes = {"length": 64, "retrieval_fraction": 0.5, "retrieval_format": {"wording": "short", "number_digits": 2}}
    runs = []
    for name, records in (("full", documents), ("blank", [None, *documents[:2], "", None, *documents[2:]])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
        more = {"train_data": str(file), "retrieval_tasks": ["s_niah_2"], "max_steps": 2, "streaming": True}
        runs.append(read_metrics(pretrain(tmp_path / name, **changes, **more)))
    assert runs[0] == runs[1]


def test_one_run_per_folder(pretrain, trained, tmp_path, capsys):
    with locked_folder(tmp_path / "run"), pytest.raises(SystemExit) as leaving:
        pretrain(tmp_path / "run")
    assert leaving.value.code == 1
    assert "another process is writing to this folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrain(trained)
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": "nothing.txt"}, "nothing.txt: no such file"),
        ({"train_data": "empty.txt"}, "empty.txt: the file is empty"),
        ({"train_data": "binary.txt"}, "binary.txt: a binary file, not text"),
        ({"train_data": "pickle.jsonl"}, "pickle.jsonl: not UTF-8 text"),
        ({"train_data": "short.txt", "length": 300}, r"hold \d+ tokens, fewer than one row of 300; give more text"),
        ({"validation_data": "empty.txt"}, "empty.txt: the file is empty"),
        ({"trackers": ["tensorboards"]}, "trackers: 'tensorboards' is not installed; installed: "),
        ({"batch_size": 5}, "batch_size is 5; allowed: multiples of device_batch_size x processes, 2"),
        ({"model_overrides": {"hidden": 3}}, "llama has no field 'hidden'"),
        ({"model_overrides": {"model_type": "lama"}}, "model_type is 'lama'"),
        ({"model_overrides": {"vocab_size": 200}}, "llama_1m.yaml: vocab_size is 200"),
        ({"model_overrides": {"hidden_size": "wide"}}, "hidden_size"),
        ({"sparse_attention": {"alfa": 1}}, "no field 'alfa'"),
        ({"attn_implementation": "asentmaxx"}, "asentmaxx"),
        ({"length": 50_000}, "fewer than one row of 50000"),
        ({"alpha_steps": 3, "attn_implementation": "sdpa", "sparse_attention": None}, "alpha_steps: the model has no"),
        ({"retrieval_fraction": 0.5}, "retrieval rows: length 33 is too short"),
        ({"retrieval_fraction": 0.5, "retrieval_format": {"digits": 3}}, "retrieval_format: .*digits"),
        ({"resume": "checkpoint-5"}, "checkpoint-5: no such checkpoint"),
        ({"output_dir": "/dev/null/run"}, "/dev/null/run: cannot be written"),
        ({"hub_model_id": "a/b/c", "push_to_hub": True}, "hub_model_id: .*a/b/c"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_what_is_wrong(pretrain, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    contents = {
        "empty.txt": b"",
        "binary.txt": b"ab\0" * 99,
        "pickle.jsonl": b"\x80\x04\x95",
        "short.txt": b"word " * 99,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as leaving:
        pretrain(tmp_path / "run", **changes)
    assert leaving.value.code == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert re.search(message, error), error
    assert not list_checkpoints(tmp_path / "run")


def test_vocabulary_larger_than_the_models(pretrain, trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        pretrain(tmp_path / "run", tokenizer=trained, model_overrides={"vocab_size": 299})
    assert leaving.value.code == 1
    assert "the tokenizer has 300 tokens, more than the model's vocab_size of 299" in capsys.readouterr().err
