"""The card: metadata as the Hub reads it, numbers with the script that made them, a snippet that runs."""

import re
import warnings

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from transformers import LlamaConfig

from hf_sparse_attention.modelcard import Measurement, create_model_card, replace_results

RESULT = Measurement(
    "perplexity", 12.3456, "some text, rows of 64 tokens", "recipes/pretrain.py", "owner/data", "test"
)


@pytest.fixture
def card(tmp_path):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, vocab_size=300)
    config.sparse_attention = {"preset": "asentmax", "alpha": 1.5, "position_encoding": "nape"}
    made = create_model_card(
        config,
        repo_id="someone/my-model",
        parameters=123_456_789,
        training={"data": ["owner/data", "a|b"], "steps": 7, "left out": None},
        training_length=64,
        results=[RESULT],
        datasets=["owner/data"],
        base_model="owner/base",
        license="apache-2.0",
    )
    made.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_metadata(card):
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "owner/base"
    assert data["datasets"] == ["owner/data"]
    assert data["license"] == "apache-2.0"
    assert {"asentmax", "sparse-attention"} <= set(data["tags"])
    index = yaml.safe_load(card.content.split("---")[1])["model-index"]
    assert index[0]["name"] == "my-model"
    (result,) = index[0]["results"]
    assert result["dataset"] == {"name": RESULT.dataset, "type": "owner/data", "split": "test"}
    assert result["metrics"] == [{"type": "perplexity", "value": 12.3456}]


def test_huggingface_hub_reads_what_was_written(card, caplog):
    """Without errors, warnings, or losing something."""
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        read = ModelCard(card.content)
        assert read.data.to_dict() == card.data.to_dict()
        assert (read.data.model_name, read.data.eval_results) == ("my-model", [RESULT.eval_result()])
        index = yaml.safe_load(card.content.split("---")[1])["model-index"]
        assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    assert not caplog.records
    with pytest.raises(ValueError, match="metadata"):
        ModelCard(card.content.replace("type: perplexity", "kind: perplexity"))


def test_text(card):
    assert card.text.strip().startswith("# my-model\n")
    assert "123.5 million parameters and ASEntmax attention" in card.text
    assert "[owner/base](https://huggingface.co/owner/base)" in card.text
    assert "| some text, rows of 64 tokens | perplexity | 12.35 | `recipes/pretrain.py` |" in card.text
    for row in ("| alpha | 1.5 |", "| hidden_size | 64 |", "| steps | 7 |", "| data | owner/data, a\\|b |"):
        assert row in card.text
    assert "left out" not in card.text
    assert "{{" not in card.content
    assert "{%" not in card.content
    for table in re.findall(r"(?:^\|.*\n)+", card.text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_stock_model_without_results():
    card = create_model_card(
        LlamaConfig(), repo_id="outputs/plain", parameters=2_500_000_000, training={}, training_length=9
    )
    assert "2.50 billion parameters and the stock attention" in card.text
    assert "Nothing measured yet." in card.text
    assert "model-index" not in card.content
    # It loads without this package.
    assert "hf_sparse_attention" not in card.text
    assert "```python\nfrom transformers import" in card.text


def test_the_same_results_put_in_again_change_nothing(card):
    before = card.content
    assert replace_results(card, [RESULT]).content == before
