"""Measured numbers go into a checkpoint's card, and nothing else of it changes."""

import json

import pytest
import update_card as recipe
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from hf_sparse_attention.modelcard import Measurement, create_model_card, replace_results


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    create_model_card(
        LlamaConfig(),
        repo_id="outputs/model",
        parameters=7,
        training={"steps": 3},
        training_length=64,
        results=[Measurement("perplexity", 99.0, "an earlier text", "recipes/pretrain.py")],
    ).save(folder / "README.md")
    return folder


def write(path, cells, protocol=None, **more):
    content = {"protocol": {"train_length": 64, "lengths": [64, 128], **(protocol or {})}, "checkpoints": cells}
    path.write_text(json.dumps({**content, **more}), encoding="utf-8")
    return str(path)


@pytest.fixture
def perplexity(tmp_path):
    cell = {"by_length": {"64": {"perplexity": 12.3456, "tokens": 2000}, "128": {"perplexity": 11.0, "tokens": 2000}}}
    run = {"settings": {"data": ["some/folder/books.jsonl"]}}
    return write(tmp_path / "perplexity.json", {"mine": cell}, run=run)


@pytest.fixture
def needle(tmp_path):
    cell = {"recall": {"s_niah_1": [[1.0, 0.5], [1.0, 0.0]]}, "recall_by_length": {}}
    return write(
        tmp_path / "needle.json", {"mine": cell, "other": cell}, {"samples_per_cell": 5, "depths": [0.0, 1.0]}
    )


def run(model, *flags):
    recipe.main(["--model", str(model), *flags])
    return ModelCard.load(model / "README.md")


def test_results_take_the_place_of_earlier_ones(model, perplexity, needle):
    before = ModelCard.load(model / "README.md")
    card = run(model, "--measured", perplexity, needle, "--label", "mine")
    assert (
        "| books.jsonl, 128 tokens (2x), 2,000 target tokens | perplexity | 11 | `recipes/perplexity.py` |"
        in card.text
    )
    assert "| s_niah_1, 128 tokens (2x), 10 samples | accuracy | 0.25 | `recipes/needle.py` |" in card.text
    assert "an earlier text" not in card.content
    shown = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    assert shown == {
        ("text-64", "perplexity"): 12.3456,
        ("text-128", "perplexity"): 11.0,
        ("s_niah_1-64", "accuracy"): 1.0,
        ("s_niah_1-128", "accuracy"): 0.25,
    }
    start, end = "## Results", "## Limits"
    assert card.text.split(start)[0] == before.text.split(start)[0]
    assert card.text.split(end)[1] == before.text.split(end)[1]
    # Once more: the same card.
    assert run(model, "--measured", perplexity, needle, "--label", "mine").content == card.content


def test_another_place_to_load_from(model, perplexity):
    card = run(model, "--measured", perplexity, "--repo_id", "someone/new-name")
    assert card.text.count('from_pretrained("someone/new-name"') == 2
    assert card.text.strip().startswith("# new-name\n")
    assert card.data.model_name == "new-name"
    assert "outputs/model" not in card.text


def test_what_is_missing_is_named(model, perplexity, needle, tmp_path):
    content = (model / "README.md").read_bytes()
    odd = write(tmp_path / "analysis.json", {"mine": {"layers": []}})
    cut = write(tmp_path / "cut.json", {"mine": {"by_length": {}}})
    infinite = {"by_length": {"64": {"perplexity": None, "tokens": 9}}}
    diverged = write(tmp_path / "diverged.json", {"mine": infinite}, run={"settings": {"data": ["a"]}})
    empty = write(tmp_path / "empty.json", {})
    for flags, message in (
        ([needle], "mine, other; say which"),
        ([perplexity, "--label", "yours"], "has mine, not yours"),
        ([odd], "neither perplexities nor needles of mine"),
        ([cut], "cut.json is not complete (KeyError('run'))"),
        ([diverged], "diverged.json is not complete (ValueError('the perplexity at 64 tokens is infinite'))"),
        ([empty], "empty.json has no checkpoints"),
        ([str(tmp_path / "nothing.json")], "nothing.json is not a perplexity.json or needle.json"),
        ([str(model / "README.md")], "README.md is not a perplexity.json"),
    ):
        with pytest.raises(SystemExit, match="error: ") as error:
            run(model, "--measured", *flags)
        assert message in str(error.value)
    with pytest.raises(SystemExit, match=r"has no README\.md"):
        run(tmp_path, "--measured", perplexity)
    assert (model / "README.md").read_bytes() == content
    assert sorted(path.name for path in model.iterdir()) == ["README.md"]


@pytest.mark.parametrize("content", [b"---\na: [\n---\n## Results\n## End\n", b"\xff\xfe"], ids=["yaml", "bytes"])
def test_a_card_that_cannot_be_read_is_named(model, perplexity, content):
    (model / "README.md").write_bytes(content)
    with pytest.raises(SystemExit, match=r"error: model: .*README\.md is not a model card"):
        run(model, "--measured", perplexity)
    assert (model / "README.md").read_bytes() == content


def test_a_card_of_another_make_is_refused():
    card = ModelCard("---\nlibrary_name: transformers\n---\n# mine\n\nNothing here.\n")
    with pytest.raises(ValueError, match="no section '## Results'"):
        replace_results(card, [])
