"""finetune.py: a softmax checkpoint becomes a sparse one, with the adapter and the merged model both usable."""

import json
import shutil

import finetune as recipe
import perplexity
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import as_flags, forget_accelerate, read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention import convert, load_adapter
from hf_sparse_attention.checkpoints import list_checkpoints

ROW = torch.arange(5, 28)[None]


@pytest.fixture(scope="module")
def softmax_checkpoint(pretrain, tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("softmax") / "run", attn_implementation="sdpa", sparse_attention=None)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Text that is quickly learned: the same words over and over."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    path = tmp_path_factory.mktemp("text") / "counting.jsonl"
    rows = [{"text": " ".join(words[start:] + words * 30)} for start in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finetune(softmax_checkpoint, counting):
    """Run finetune.py in this process with tiny options and changes."""
    tiny = {
        "model_name_or_path": str(softmax_checkpoint),
        "attn_implementation": "asentmax",
        "alpha_steps": 4,
        "lora_rank": 4,
        "train_data": [str(counting)],
        "length": 33,
        "shuffle_tokens": 3000,
        "max_steps": 30,
        "batch_size": 4,
        "device_batch_size": 2,
        "learning_rate": 3e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_steps": 20,
    }

    def run(output, **changes):
        forget_accelerate()
        try:
            recipe.main(as_flags({**tiny, "output_dir": str(output), **changes}))
        finally:
            forget_accelerate()
        return output

    return run


@pytest.fixture(scope="module")
def tuned(finetune, tmp_path_factory):
    """An undisturbed LoRA run."""
    return finetune(tmp_path_factory.mktemp("tuned") / "run")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model):
    return model(ROW).logits


def test_what_a_run_writes(tuned, softmax_checkpoint):
    metrics = read_metrics(tuned)
    assert [line["alpha"] for line in metrics] == [1.0, 1.125, 1.25, 1.375] + 26 * [1.5]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    merged, base = load(tuned), load(softmax_checkpoint)
    assert merged.config._attn_implementation == "asentmax"
    assert merged.config.sparse_attention["alpha"] == 1.5
    changed = {name for name, p in base.named_parameters() if not torch.equal(p, merged.get_parameter(name))}
    linear = {name for name, p in base.named_parameters() if "_proj" in name}
    assert changed == linear
    adapted = load_adapter(base, tuned / "adapter").eval()
    torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-4, rtol=1e-4)
    scale = [
        p for name, p in adapted.named_parameters() if "length_scale.modules_to_save" in name and "weight" in name
    ]
    assert len(scale) == 4
    assert all(parameter.abs().max() > 0 for parameter in scale)
    card = (tuned / "README.md").read_text()
    assert "| LoRA rank | 4 |" in card
    assert "ASEntmax attention" in card


def test_resumed_run_ends_as_the_undisturbed_one(tuned, finetune, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(tuned, output)
    shutil.rmtree(list_checkpoints(output)[-1])
    (output / "model.safetensors").unlink()
    finetune(output, resume="latest")
    assert read_metrics(output) == read_metrics(tuned)
    assert torch.equal(logits(load(output)), logits(load(tuned)))


OTHER_ADAPTERS = {
    "rank": ({"lora_rank": 8}, "lora_rank is 8, not 4"),
    "none": ({"lora_rank": 0}, "lora_rank is 0, not 4"),
    "scaling": ({"lora_alpha": 5}, "lora_alpha is 5.0, not None"),
    "layers": ({"lora_targets": ["q_proj"]}, "lora_targets is ['q_proj'], not None"),
    "DoRA": ({"lora_dora": True}, "lora_dora is True, not False"),
    "preset": ({"attn_implementation": "entmax"}, "attn_implementation is 'entmax', not 'asentmax'"),
    "alpha": ({"sparse_attention": {"alpha": 2}}, "sparse_attention.alpha is 2.0, not 1.5"),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_ADAPTERS.values(), ids=OTHER_ADAPTERS)
def test_a_run_does_not_go_on_with_another_adapter(tuned, finetune, tmp_path, capsys, changes, message):
    output = tmp_path / "run"
    shutil.copytree(tuned, output)
    with pytest.raises(SystemExit) as stop:
        finetune(output, resume="latest", max_steps=40, **changes)
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("finetune.py: error: ")
    assert message in error
    assert read_metrics(output) == read_metrics(tuned)


def test_a_run_does_not_go_on_from_another_checkpoint(tuned, finetune, softmax_checkpoint, tmp_path, capsys):
    """Its weights are in the run's own checkpoints, but the merged model is made from the folder that is given."""
    other, output = tmp_path / "other", tmp_path / "run"
    shutil.copytree(softmax_checkpoint, other)
    shutil.copytree(tuned, output)
    with pytest.raises(SystemExit):
        finetune(output, resume="latest", model_name_or_path=str(other))
    assert f"model_name_or_path is '{other}', not '{softmax_checkpoint}'" in capsys.readouterr().err


def test_dora_on_chosen_layers(finetune, tmp_path):
    output = finetune(tmp_path / "run", lora_dora=True, lora_targets=["q_proj", "o_proj"], max_steps=2)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"]
    assert sorted(config["target_modules"]) == ["o_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    # The ramp is longer than the run.
    assert config["sparse_attention"]["alpha"] == load(output).config.sparse_attention["alpha"] == 1.25


def test_full_fine_tuning(finetune, softmax_checkpoint, tmp_path):
    output = finetune(tmp_path / "run", lora_rank=0, max_steps=3, alpha_steps=2)
    assert not (output / "adapter").exists()
    base, model = load(softmax_checkpoint), load(output)
    assert not any(torch.equal(p, model.get_parameter(name)) for name, p in base.named_parameters())
    assert model.config.sparse_attention["alpha"] == 1.5


def test_perplexity_measures_the_result(tuned, softmax_checkpoint, counting, tmp_path, monkeypatch):
    patched = load(softmax_checkpoint)
    convert(patched, "asentmax")
    patched.save_pretrained(tmp_path / "patched")
    models = {"softmax": softmax_checkpoint, "patched": tmp_path / "patched", "tuned": tuned}
    options = {
        "models": [f"{name}={folder}" for name, folder in models.items()],
        "data": [str(counting)],
        "max_documents": 3,
    }
    options |= {"tokenizer": str(softmax_checkpoint), "train_length": 33, "multiples": [1, 2], "resamples": 10}
    flags = as_flags({**options, "output_dir": str(tmp_path)})
    monkeypatch.setattr("sys.argv", ["perplexity.py", *flags])
    forget_accelerate()
    perplexity.main()
    forget_accelerate()
    checkpoints = json.loads((tmp_path / "perplexity.json").read_text())["checkpoints"]
    for length in ("33", "66"):
        measured = {name: result["by_length"][length]["perplexity"] for name, result in checkpoints.items()}
        assert measured["tuned"] < 0.95 * measured["patched"]


def edit(name, change):
    """Damages a file of a checkpoint."""

    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if change is not None:
            (folder / name).write_bytes(change(content))

    return damage


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def more_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["needle"])
    tokenizer.save_pretrained(folder)


BROKEN = {
    "weights cut": (edit("model.safetensors", lambda data: data[:-7]), "model.safetensors is cut short or damaged"),
    "weights flipped": (edit("model.safetensors", lambda data: data[:9] + b"!" + data[10:]), "model.safetensors is"),
    "weights missing": (edit("model.safetensors", None), "no file named model.safetensors"),
    "one weight missing": (
        edit_weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        "lacks weights, which would be random: model.layers.1.mlp.up_proj.weight",
    ),
    "NaN": (
        edit_weights(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)),
        "the weight model.norm.weight holds NaN",
    ),
    "config cut": (edit("config.json", lambda data: data[:60]), "config.json"),
    "config binary": (edit("config.json", lambda data: b"\x80\x81"), "config.json"),
    "config missing": (edit("config.json", None), "config.json"),
    "tokenizer cut": (edit("tokenizer.json", lambda data: data[:60]), "tokenizer.json is not valid JSON"),
    "tokenizer missing": (edit("tokenizer.json", None), "no usable tokenizer in "),
    "vocabulary": (more_tokens, "the tokenizer has 301 tokens, more than the model's vocab_size of 300"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_named(finetune, softmax_checkpoint, tmp_path, capsys, damage, message):
    base = tmp_path / "base"
    shutil.copytree(softmax_checkpoint, base, ignore=shutil.ignore_patterns("checkpoint-*"))
    damage(base)
    with pytest.raises(SystemExit) as stop:
        finetune(tmp_path / "run", model_name_or_path=str(base))
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("finetune.py: error: ")
    assert message in error
    assert not list((tmp_path / "run").glob("[!.]*safetensors"))


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"lora_rank": -1}, 2, "lora_rank is -1; allowed: at least 0"),
        ({"lora_dropout": 1}, 2, "lora_dropout is 1.0; allowed: 0 to below 1"),
        ({"model_name_or_path": None, "model_config": "x.yaml"}, 2, "pretrain.py trains from scratch"),
        ({"attn_implementation": None}, 1, "has no sparse attention"),
        ({"attn_implementation": None, "alpha_steps": 0}, 1, "has no sparse attention"),
        (
            {"lora_targets": ["q_proj", "query"]},
            1,
            "no layer is named 'query'; there are down_proj, gate_proj, k_proj",
        ),
    ],
)
def test_what_is_wrong_is_named(finetune, tmp_path, capsys, changes, code, message):
    with pytest.raises(SystemExit) as stop:
        finetune(tmp_path / "run", **changes)
    assert stop.value.code == code
    assert message in capsys.readouterr().err
