"""Importing the package: idempotent, invisible to models that do not ask for a preset, enforced on reload."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from families import alone, prompts, tiny_config, tiny_model
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface

import hf_sparse_attention
from hf_sparse_attention import PRESETS

# Leaves ``results`` behind.
STOCK = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
results = []
for attention in ("eager", "sdpa", None):
    config = LlamaConfig(vocab_size=31, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 31, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = model(ids, attention_mask=mask, labels=ids, output_attentions=attention == "eager")
    out.loss.backward()
    results += [out.logits, model.model.layers[0].self_attn.q_proj.weight.grad, *(out.attentions or ())]
    results.append(model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))
"""

WITHOUT_THE_PACKAGE = """
import sys
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
torch.save(results, f"{folder}/results.pt")
assert "hf_sparse_attention" not in sys.modules
AutoModelForCausalLM.from_pretrained(f"{folder}/sparse")
"""


@pytest.fixture(scope="module")
def without_the_package(tmp_path_factory):
    """What stock models compute in a process without the package, and how loading a sparse model ends there."""
    folder = tmp_path_factory.mktemp("without")
    tiny_model(position="nape").save_pretrained(folder / "sparse")
    process = subprocess.run(
        [sys.executable, "-c", STOCK + WITHOUT_THE_PACKAGE, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    return torch.load(folder / "results.pt", weights_only=True), process


@pytest.mark.parametrize("by_keyword", [False, True], ids=["by position", "by keyword"])
@pytest.mark.parametrize("preset", ["asentmax", "sdpa"])
def test_packed_documents_need_no_dense_mask(preset, by_keyword):
    """Models differ in how they hand the positions to what would make one."""
    config = tiny_config()
    config._attn_implementation = preset
    hidden, positions = torch.zeros(1, 6, 48), torch.tensor([[0, 1, 2, 0, 1, 2]])
    arguments = (config, hidden, None, None, positions, None)
    preprocess = masking_utils._preprocess_mask_arguments
    names = list(inspect.signature(preprocess).parameters)
    documents = (preprocess(**dict(zip(names, arguments))) if by_keyword else preprocess(*arguments))[2]
    assert documents is None if preset == "asentmax" else documents.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_importing_twice_is_harmless():
    wrapped = [PreTrainedModel.post_init, PreTrainedModel._initialize_weights, PreTrainedConfig.from_dict.__func__]
    hf_sparse_attention.register()
    assert wrapped == [
        PreTrainedModel.post_init,
        PreTrainedModel._initialize_weights,
        PreTrainedConfig.from_dict.__func__,
    ]
    assert set(PRESETS) <= set(AttentionInterface().valid_keys())
    assert set(PRESETS) <= set(AttentionMaskInterface().valid_keys())


def test_other_models_compute_bit_for_bit_the_same(without_the_package):
    plain, _ = without_the_package
    names = {}
    with torch.device("cpu"):
        exec(STOCK, names)
    assert len(plain) == len(names["results"]) == 11
    assert all(torch.equal(a, b) for a, b in zip(plain, names["results"]))


def test_loading_without_the_package_stops(without_the_package):
    _, process = without_the_package
    assert process.returncode != 0
    assert 'attn_implementation="asentmax"` is not supported' in process.stderr


def test_a_later_eager_model_still_returns_attentions():
    tiny_model()
    model = AutoModelForCausalLM.from_config(tiny_config(attn_implementation="eager"))
    out = model(torch.stack(prompts(5)), output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(1, 6, 5, 5)] * 2


def test_models_of_different_settings_side_by_side():
    nape, plain = tiny_model(position="nape"), tiny_model(preset="softmax")
    (row,) = prompts(7)
    before = alone(nape, row)
    alone(plain, row)
    assert torch.equal(alone(nape, row), before)
    assert plain.config.sparse_attention["position_encoding"] == "model"


@pytest.mark.parametrize("others", [["entmax"], ["asentmax", "softmax", "sdpa"]], ids=str)
def test_models_built_from_one_config_keep_their_attention(others):
    config = tiny_config()
    first = AutoModelForCausalLM.from_config(config, attn_implementation="asentmax").eval()
    (row,) = prompts(7)
    before, settings = alone(first, row), dict(first.config.sparse_attention)
    for other in others:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=other).eval()
        assert model.config._attn_implementation == other
        alone(model, row)
    assert torch.equal(alone(first, row), before)
    assert (first.config._attn_implementation, first.config.sparse_attention) == ("asentmax", settings)
    assert config.sparse_attention is None
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "sdpa"


def test_saved_config_is_plain_json(tmp_path):
    tiny_model(position="nape").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attn_implementation"] == "asentmax"
    assert config["sparse_attention"]["position_encoding"] == "nape"
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_explicit_choice_is_respected_and_survives_saving(tmp_path, attention):
    tiny_model(position="nape").save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert not any(".length_scale." in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config._attn_implementation == attention
