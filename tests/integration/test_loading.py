"""Softmax checkpoints loaded with sparse attention, and initial values that no checkpoint holds."""

import copy
import pickle

import pytest
import torch
from families import alone, prompts, randomize_scale, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from hf_sparse_attention.length_scale import HeadConstant, HeadProjection


@pytest.fixture
def softmax_checkpoint(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def check_initial_scale(model, preset="asentmax"):
    modules = [m for m in model.modules() if isinstance(m, HeadProjection | HeadConstant)]
    assert len(modules) == {"asentmax": 4, "ssmax": 2}[preset]
    for module in modules:
        expected = module.value if isinstance(module, HeadConstant) else 0.0
        assert torch.equal(module.weight, torch.full_like(module.weight, expected))
        if getattr(module, "bias", None) is not None:
            assert torch.equal(module.bias, torch.full_like(module.bias, module.bias_init))


@pytest.mark.parametrize("preset", ["asentmax", "ssmax"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.bfloat16}], ids=str
)
def test_missing_scale_parameters_start_as_designed(softmax_checkpoint, kwargs, preset):
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint, attn_implementation=preset, **kwargs)
    check_initial_scale(model, preset)
    assert model.model.layers[0].self_attn.length_scale is not None
    (row,) = prompts(6)
    assert alone(model, row).isfinite().all()


def test_loading_says_which_parameters_are_new(softmax_checkpoint, caplog):
    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING", logger="transformers"):
            _, info = AutoModelForCausalLM.from_pretrained(
                softmax_checkpoint, attn_implementation="asentmax", output_loading_info=True
            )
    finally:
        logging.disable_propagation()
    assert all(".length_scale." in name for name in info["missing_keys"])
    assert len(info["missing_keys"]) == 8
    assert "length_scale.beta_proj.weight" in caplog.text
    assert "MISSING" in caplog.text


def test_initial_scale_is_nearly_one():
    """W = 0, beta bias -4: t = 1 + softplus(-4) whatever n is."""
    model = AutoModelForCausalLM.from_config(tiny_config(attn_implementation="asentmax"))
    beta, gamma = model.model.layers[0].self_attn.length_scale(torch.randn(2, 5, 48))
    torch.testing.assert_close(beta, F.softplus(torch.full((2, 6, 5), -4.0)))
    assert gamma.abs().max() == 0


def test_meta_device_then_materialised():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(attn_implementation="asentmax"))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    check_initial_scale(model)


def test_a_partly_saved_scale_keeps_what_is_saved(tmp_path):
    model = tiny_model()
    state = {k: v for k, v in model.state_dict().items() if "gamma_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    scale, saved = loaded.model.layers[1].self_attn.length_scale, model.model.layers[1].self_attn.length_scale
    assert torch.equal(scale.beta_proj.weight, saved.beta_proj.weight)
    assert scale.gamma_proj.weight.abs().max() == 0


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(copier):
    model = tiny_model(position="nape")
    (row,) = prompts(8)
    assert torch.equal(alone(copier(model), row), alone(model, row))


def test_half_precision_and_state_dict(tmp_path):
    model = tiny_model(position="nape")
    (row,) = prompts(8)
    expected = alone(model, row)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = tiny_model(position="nape")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(alone(other, row), expected)
    half = alone(model.to(torch.bfloat16), row)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


def test_classification_head(tmp_path):
    config = tiny_config(attn_implementation="asentmax", num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    randomize_scale(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "asentmax"
    ids = torch.stack(prompts(7, 7))
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
