"""recipes/analyze.py from the command line."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM

import hf_sparse_attention
from hf_sparse_attention.analysis import analyze

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the recipe in this process; returns what it printed."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [str(RECIPES / "analyze.py"), *map(str, flags)])
        runpy.run_path(str(RECIPES / "analyze.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def texts(tmp_path_factory, essay) -> Path:
    file = tmp_path_factory.mktemp("analyze") / "texts.jsonl"
    parts = [essay[:400], essay[700:720], essay[3000:3600]]
    file.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return file


def test_checkpoints_side_by_side(run, tmp_path, texts, tokenizer, softmax_checkpoint, asentmax_checkpoint):
    models = [f"rope={softmax_checkpoint}", f"mine={asentmax_checkpoint}"]
    out = run(
        *("--models", *models, "--data", texts, "--output_dir", tmp_path, "--max_length", 70, "--map_tokens", 30)
    )
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert result["train_length"] == 24
    assert list(result["checkpoints"]) == ["rope", "mine"]
    rope, mine = result["checkpoints"].values()
    assert (rope["attention"], mine["attention"]) == ("sdpa", "asentmax")
    assert (mine["documents"], mine["tokens"]) == (2, 140)  # the second document is too short
    assert result["run"]["settings"]["max_length"] == 70

    # The same through the library, on the same two documents.
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    ids = [tokenizer(documents[i])["input_ids"][:70] for i in (0, 2)]
    model = AutoModelForCausalLM.from_pretrained(asentmax_checkpoint)
    direct = analyze(model, ids).to_dict()
    assert mine["entropy"] == direct["entropy"]
    assert mine["beta"][0][:2] == [None, None]
    assert mine["beta"][1][2:] == direct["beta"][1][2:]
    # A softmax checkpoint is measured as it is: all keys have a weight, as in transformers' own eager attention.
    eager = AutoModelForCausalLM.from_pretrained(softmax_checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        weights = torch.cat([eager(torch.tensor([row]), output_attentions=True).attentions[1] for row in ids])
    last = weights[:, 3, 64:70].double()
    entropy = torch.special.entr(last).sum(-1) / torch.arange(65.0, 71.0).log()
    assert rope["entropy"][1][3][6] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert rope["support"] == [[row] * 4 for row in rope["keys"]]

    table = (tmp_path / "analysis.md").read_text()
    assert table in out
    assert table.count("| mine, ALiBi heads") == table.count("| mine, no ALiBi heads") == 4
    assert table.count("| rope, no ALiBi heads") == 4
    for name in ("analysis", "length_scale", "attention"):
        assert imread(tmp_path / f"{name}.png").std() > 0.05
        assert f"{name}.png" in out


def test_softmax_alone_has_no_length_scale(run, tmp_path, texts, softmax_checkpoint):
    out = run(
        *("--models", softmax_checkpoint, "--data", texts, "--output_dir", tmp_path),
        *("--max_length", 50, "--min_length", 5, "--dtype", "bfloat16"),
    )
    assert not (tmp_path / "length_scale.png").exists()
    assert "length_scale.png" not in out
    (result,) = json.loads((tmp_path / "analysis.json").read_text())["checkpoints"].values()
    assert (result["documents"], result["dtype"]) == (3, "bfloat16")
    assert result["beta"] == [[None] * 4] * 2


def test_experiments_need_no_checkpoint(run, tmp_path):
    config = RECIPES / "configs" / "eval" / "analyze_experiments.yaml"
    lengths = ["--entropy_lengths", 8, 32, "--early_token_lengths", 5, 9]
    out = run(config, "--output_dir", tmp_path, *lengths)
    content = json.loads((tmp_path / "experiments.json").read_text())
    assert content["dispersion"]["lengths"] == [8, 32]
    assert content["early_token"]["lengths"] == [5, 9]
    assert content["run"]["versions"]["hf_sparse_attention"] == hf_sparse_attention.__version__
    table = (tmp_path / "experiments.md").read_text()
    assert table in out
    assert f"{content['dispersion']['uniform']['softmax']['entropy'][1]:.2f}" in table
    assert "bit-equal" in table
    assert imread(tmp_path / "experiments.png").std() > 0.05
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [f"experiments.{e}" for e in ("json", "md", "png")]


ERRORS = {
    "dtype": (["--experiments", "--dtype", "int8"], "dtype is 'int8'; allowed: auto, float32"),
    "max_length": (["--experiments", "--max_length", "1"], "max_length is 1; allowed: at least 2"),
    "min_length": (["--experiments", "--min_length", "2000"], "min_length is 2000; allowed: 2 to max_length (1024)"),
    "lengths": (["--experiments", "--entropy_lengths", "4"], "entropy_lengths are [4]; allowed: at least 8 each"),
    "unknown option": (["--model", "a"], "unknown option: ['--model', 'a']"),
}


@pytest.mark.parametrize(("flags", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_options_are_named(run, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_inputs_are_named(run, texts, tmp_path, softmax_checkpoint):
    flags = ["--data", texts, "--output_dir", tmp_path, "--max_length", 70]
    with pytest.raises(SystemExit, match="models: give at least one checkpoint, or --experiments"):
        run(*flags)
    with pytest.raises(SystemExit, match="data: the models need a text"):
        run("--models", softmax_checkpoint)
    with pytest.raises(SystemExit, match="no folder '/nowhere'"):
        run("--models", "/nowhere", *flags)
    with pytest.raises(SystemExit, match=r"layer is 5; allowed: -2 to 1"):
        run("--models", softmax_checkpoint, *flags, "--map_layer", 5)
    with pytest.raises(SystemExit, match=r"no document has 900 tokens, the longest has \d+; give a smaller"):
        run("--models", softmax_checkpoint, *flags[:-1], 900)
    assert not list(tmp_path.glob("[!.]*"))
