"""recipes/perplexity.py and recipes/needle.py from the command line."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from faulty_disk import largest_file, read_only
from launched import COMMANDS, launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention.arguments import parse
from hf_sparse_attention.checkpoints import locked_folder

RECIPES = Path(__file__).parents[3] / "recipes"
ARGUMENTS = {
    "perplexity.py": "PerplexityArguments",
    "needle.py": "NeedleArguments",
    "analyze.py": "AnalyzeArguments",
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory, essay) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    parts = [essay[:700], essay[3000:3900], essay[9000:9100]]
    file.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return file


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a recipe in this process; returns what it printed."""

    def run(recipe, *flags):
        monkeypatch.setattr(sys, "argv", [str(RECIPES / recipe), *map(str, flags)])
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")
        return capsys.readouterr().out

    return run


def perplexity_flags(texts, folder, *models):
    return ["--models", *models, "--data", texts, "--output_dir", folder, "--multiples", 1, 2, 4, "--stride", 31]


def needle_flags(folder, *models):
    return [
        *("--models", *models, "--output_dir", folder, "--cache_dir", folder / "samples", "--lengths", 90, 121),
        *("--tasks", "s_niah_1", "mk_niah_1", "--wording", "short", "--number_digits", 1, "--samples", 2),
        *("--depths", 0, 1, "--train_length", 90),
    ]


def numbers(file):
    """The results of a file, without what tells runs apart."""
    content = json.loads(file.read_text())
    content.pop("run")
    return content


# Of the models of perplexity.py.
SCALING = ["--rope_scaling", "none", "yarn", "none"]


@pytest.fixture(scope="module")
def models(softmax_checkpoint, asentmax_checkpoint):
    """Models by recipe."""
    return {
        "perplexity.py": [*[f"rope={softmax_checkpoint}"] * 2, f"mine={asentmax_checkpoint}"],
        "needle.py": [f"soft={softmax_checkpoint}", f"mine={asentmax_checkpoint}"],
    }


@pytest.fixture(scope="module")
def double(tmp_path_factory, texts, models):
    """Folders that two processes wrote to, by recipe."""
    root = tmp_path_factory.mktemp("double")
    folders = {recipe: root / recipe for recipe in models}
    flags = {
        "perplexity.py": [
            *perplexity_flags(texts, folders["perplexity.py"], *models["perplexity.py"]),
            *(*SCALING, "--batch_tokens", 200),
        ],
        "needle.py": [*needle_flags(folders["needle.py"], *models["needle.py"]), "--batch_tokens", 100],
    }
    commands = [[str(RECIPES / recipe), *map(str, flags[recipe])] for recipe in models]
    launch("multi_gpu.yaml", COMMANDS, commands, root)
    return folders


def test_perplexity_recipe(run, texts, tmp_path, models, softmax_checkpoint, double):
    flags = [*perplexity_flags(texts, tmp_path / "one", *models["perplexity.py"]), *SCALING]
    out = run("perplexity.py", *flags)
    result = json.loads((tmp_path / "one" / "perplexity.json").read_text())
    assert list(result["checkpoints"]) == ["rope", "rope+yarn", "mine"]
    assert result["protocol"]["lengths"] == [24, 48, 96]
    assert (result["protocol"]["target_tokens"], result["protocol"]["stride"]) == (12, 31)
    assert (result["protocol"]["documents"], result["protocol"]["documents_too_short"]) == (2, 1)
    assert result["checkpoints"]["mine"]["sparse_attention"]["position_encoding"] == "nape"
    assert result["checkpoints"]["rope+yarn"]["rope_parameters"]["factor"] == 4.0
    assert result["run"]["settings"]["seed"] == 0
    assert {"torch", "transformers", "hf_sparse_attention"} <= set(result["run"]["versions"])
    assert f"{result['checkpoints']['mine']['by_length']['96']['perplexity']:.4g}" in out
    assert (tmp_path / "one" / "perplexity.md").read_text().count("| rope+yarn") == 2
    assert (tmp_path / "one" / "perplexity.png").read_bytes().startswith(b"\x89PNG")

    # Once more by hand: the loss of the last 12 tokens of every window, from 24 and from 96 tokens.
    tokenizer = AutoTokenizer.from_pretrained(softmax_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint).eval()
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    for length in (24, 96):
        losses = []
        for ids in (tokenizer.encode(text, add_special_tokens=False) for text in documents):
            for end in range(96, len(ids) + 1, 31):
                window = torch.tensor([ids[end - length : end]])
                labels = window.clone()
                labels[:, :-12] = -100
                with torch.no_grad():
                    losses.append(model(input_ids=window, labels=labels).loss.item())
        assert result["checkpoints"]["rope"]["by_length"][str(length)]["loss"] == pytest.approx(
            sum(losses) / len(losses), rel=1e-5
        )

    two = double["perplexity.py"]
    assert json.loads((two / "perplexity.json").read_text())["run"]["processes"] == 2
    run("perplexity.py", *flags, "--batch_tokens", 200)
    assert numbers(two / "perplexity.json") == numbers(tmp_path / "one" / "perplexity.json")


def test_needle_recipe(run, tmp_path, models, double):
    flags = [*needle_flags(tmp_path / "one", *models["needle.py"]), "--batch_tokens", 100]
    out = run("needle.py", *flags)
    result = json.loads((tmp_path / "one" / "needle.json").read_text())
    assert list(result["checkpoints"]) == ["soft", "mine"]
    grid = result["checkpoints"]["mine"]["recall"]["mk_niah_1"]
    assert (len(grid), len(grid[0])) == (2, 2)
    answers = [json.loads(line) for line in (tmp_path / "one" / "answers_mine.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * 2 * 2 * 2
    cell = [a for a in answers if (a["task"], a["length"], a["depth"]) == ("mk_niah_1", 121, 1.0)]
    assert grid[1][1] == sum(a["answer"] in a["prediction"] for a in cell) / 2
    assert re.search(r"\| mine mk_niah_1 +\| +\d+% \| +\d+% \|", out)
    assert (tmp_path / "one" / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "one" / "samples").iterdir())) == 4

    run("needle.py", *needle_flags(tmp_path / "forced", *models["needle.py"]), "--decoding", "forced")
    forced = json.loads((tmp_path / "forced" / "needle.json").read_text())
    for name, checkpoint in forced["checkpoints"].items():
        assert checkpoint["recall"] == result["checkpoints"][name]["recall"]
    assert "most likely" in forced["protocol"]["decoding"]

    two = double["needle.py"]
    assert json.loads((two / "needle.json").read_text())["run"]["processes"] == 2
    assert numbers(two / "needle.json") == numbers(tmp_path / "one" / "needle.json")
    for name in ("soft", "mine"):
        file = f"answers_{name}.jsonl"
        assert (two / file).read_text() == (tmp_path / "one" / file).read_text()


@pytest.mark.parametrize("recipe", ["perplexity.py", "needle.py"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "/nowhere/model"], "no folder '/nowhere/model'"),
        (["--tokenizer", "/nowhere/tokenizer"], "tokenizer: no usable tokenizer in /nowhere/tokenizer"),
        (["--rope_scaling", "linear"], "rope_scaling is 'linear'"),
        (["--rope_scaling", "yarn", "--rope_factor", "0.5"], "rope_factor is 0.5"),
        (["--rope_factor", "4"], "rope_factor is 4.0, but rope_scaling is none"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--bos", "maybe"], "bos is 'maybe'"),
        (["--depth", "3"], "--depth"),
        (["--multiples", "1", "inf"], "multiples: inf is not above 0 and finite"),
        (["--multiples", "nan"], "multiples: nan is not above 0 and finite"),
        (["--batch_tokens", "0"], "batch_tokens is 0; allowed: at least 1"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_errors_name_what_is_wrong(run, capsys, texts, tmp_path, softmax_checkpoint, recipe, flags, message):
    base = {"perplexity.py": perplexity_flags(texts, tmp_path, softmax_checkpoint)}
    base["needle.py"] = needle_flags(tmp_path, softmax_checkpoint)
    with pytest.raises(SystemExit) as stopped:
        run(recipe, *base[recipe], *flags)
    printed = capsys.readouterr().err + str(stopped.value)
    assert message in printed
    assert stopped.value.code not in (0, None)


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        ("perplexity.py", "target_tokens"),
        ("perplexity.py", "stride"),
        ("needle.py", "answer_tokens"),
        ("analyze.py", "train_length"),
    ],
)
def test_zero_is_not_taken_for_the_default(run, capsys, recipe, option):
    data = [] if recipe == "needle.py" else ["--data", "text.jsonl"]
    with pytest.raises(SystemExit) as stopped:
        run(recipe, "--models", "model", *data, f"--{option}=0")
    assert stopped.value.code == 2
    assert f"{option} is 0; allowed: at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ARGUMENTS)
def test_an_output_folder_that_cannot_be_written(run, texts, tmp_path, softmax_checkpoint, recipe):
    """What an earlier run wrote there is kept as it was."""
    output = tmp_path / "results"
    output.mkdir()
    (output / recipe.replace(".py", ".json")).write_text("earlier")
    flags = {
        "perplexity.py": perplexity_flags(texts, output, softmax_checkpoint),
        "needle.py": [*needle_flags(output, softmax_checkpoint), "--cache_dir", tmp_path],
        "analyze.py": [*("--models", softmax_checkpoint), "--data", texts, "--output_dir", output, "--max_length", 20],
    }[recipe]
    with read_only(output), pytest.raises(SystemExit) as stopped:
        run(recipe, *flags)
    assert str(stopped.value.code).startswith(f"{recipe}: error: {output}: cannot be written")
    with locked_folder(output), pytest.raises(SystemExit) as stopped:
        run(recipe, *flags)
    assert stopped.value.code == f"{recipe}: error: {output}: another process is writing to this folder"
    # What is not in a cache already would not fit there.
    run(recipe, *flags, "--output_dir", tmp_path / "other")
    if recipe == "needle.py":
        elsewhere = ["--cache_dir", tmp_path / "cache"]
        with (
            largest_file(900),
            pytest.raises(SystemExit, match=f"cache_dir: {tmp_path}/cache/.* could not be written"),
        ):
            run(recipe, *flags, *elsewhere)
    with largest_file(900), pytest.raises(SystemExit) as stopped:
        run(recipe, *flags)
    assert str(stopped.value.code).startswith(f"{recipe}: error: {output}: could not be written")
    written = [path for path in output.iterdir() if path.name != ".lock"]
    assert [path.read_text() for path in written] == ["earlier"]


@pytest.mark.parametrize("recipe", ["perplexity.py", "needle.py"])
def test_a_tokenizer_larger_than_the_model(run, texts, tmp_path, tokenizer, make_checkpoint, recipe):
    folder = make_checkpoint(tmp_path / "small", tokenizer, vocab_size=300)
    flags = {"perplexity.py": perplexity_flags(texts, tmp_path, folder), "needle.py": needle_flags(tmp_path, folder)}
    with pytest.raises(SystemExit, match="token ids up to 399, the model has 300 embeddings"):
        run(recipe, *flags[recipe])


def test_weights_missing_from_a_checkpoint(run, texts, tmp_path, tokenizer, make_checkpoint):
    folder = make_checkpoint(tmp_path / "shallow", tokenizer, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(SystemExit, match=r"lacks weights.*layers\.1\."):
        run("perplexity.py", *perplexity_flags(texts, tmp_path, folder))


def test_checkpoints_with_different_tokenizers(run, texts, tmp_path, tokenizer, make_checkpoint, softmax_checkpoint):
    folder = make_checkpoint(tmp_path / "other", tokenizer)
    other = AutoTokenizer.from_pretrained(folder)
    other.add_tokens(["needle"])
    other.save_pretrained(folder)
    with pytest.raises(SystemExit, match="other and first have different tokenizers"):
        run("perplexity.py", *perplexity_flags(texts, tmp_path, f"first={softmax_checkpoint}", f"other={folder}"))


def test_text_too_short(run, texts, tmp_path, softmax_checkpoint):
    flags = perplexity_flags(texts, tmp_path, softmax_checkpoint)
    with pytest.raises(SystemExit, match="text is too short for length 5000"):
        run("perplexity.py", *flags, "--lengths", 24, 5000)
    with pytest.raises(SystemExit, match="length 20 is too short for task s_niah_1"):
        run("needle.py", *needle_flags(tmp_path, softmax_checkpoint), "--lengths", 20)
    with pytest.raises(SystemExit, match=r"missing\.txt"):
        run("perplexity.py", *flags, "--data", tmp_path / "missing.txt")


@pytest.mark.parametrize("recipe", ARGUMENTS)
def test_help_explains_every_flag(run, capsys, recipe):
    with pytest.raises(SystemExit) as stopped:
        run(recipe, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    module = runpy.run_path(str(RECIPES / recipe))
    arguments = module[ARGUMENTS[recipe]]
    for name, field in arguments.__dataclass_fields__.items():
        assert f"--{name}" in text
        assert len(field.metadata["help"]) > 10


@pytest.mark.parametrize("config", sorted((RECIPES / "configs" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_parse_and_carry_their_command(config):
    recipe = re.search(r"accelerate launch recipes/(\w+\.py) (\S+)", config.read_text().split("\n\n")[0])
    assert recipe[2] == f"recipes/configs/eval/{config.name}"
    module = runpy.run_path(str(RECIPES / recipe[1]))
    (args,) = parse(module[ARGUMENTS[recipe[1]]], argv=[str(config), "--models", "a=folder"])
    assert args.output_dir == f"outputs/{config.stem}"
    assert args.models == ["a=folder"]
