"""convert and revert change a built model in place and leave nothing behind."""

import pytest
import torch
from families import FAMILIES, alone, prompts, randomize_scale, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_sparse_attention import convert, revert


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_equals_loading(family, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    model.save_pretrained(tmp_path)
    new = convert(model, "asentmax", position_encoding="nape")
    assert len(new) == 8
    assert all(".length_scale." in name for name in new)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="asentmax", sparse_attention={"position_encoding": "nape"}
    )
    (row,) = prompts(9)
    assert torch.equal(alone(model, row), alone(loaded, row))
    assert model.config.sparse_attention == loaded.config.sparse_attention


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_revert_restores_the_model(family, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    (row,) = prompts(9)
    before, names = alone(model, row), list(model.state_dict())
    config = model.config.to_dict()
    convert(model)
    assert not torch.equal(alone(model, row), before)
    revert(model)
    assert torch.equal(alone(model, row), before)
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == config
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no sparse attention to remove"):
        revert(model)


def test_converted_model_survives_saving(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config()).eval()
    convert(model, "asentmax", position_encoding="nape")
    randomize_scale(model)
    model.save_pretrained(tmp_path)
    (row,) = prompts(9)
    assert torch.equal(alone(AutoModelForCausalLM.from_pretrained(tmp_path), row), alone(model, row))


def test_converting_again_keeps_learned_scales():
    model = tiny_model(position="nape")
    learned = {k: v.clone() for k, v in model.state_dict().items() if ".length_scale." in k}
    assert convert(model, "asentmax", alpha=2.0) == []
    assert model.config.sparse_attention["alpha"] == 2.0
    assert model.config.sparse_attention["position_encoding"] == "nape"
    assert all(torch.equal(model.state_dict()[k], v) for k, v in learned.items())
    convert(model, "entmax")
    assert not any(".length_scale." in name for name in model.state_dict())
    (row,) = prompts(5)
    assert alone(model, row).isfinite().all()


def test_switching_on_without_conversion_raises_and_names_it():
    model = AutoModelForCausalLM.from_config(tiny_config()).eval()
    model.set_attn_implementation("asentmax")
    with pytest.raises(ValueError, match=r"hf_sparse_attention.convert\(model, 'asentmax'\)"):
        model(torch.stack(prompts(5)))


def test_switching_between_presets_without_conversion_raises():
    model = tiny_model()
    model.set_attn_implementation("ssmax")
    with pytest.raises(ValueError, match=r"built with attn_implementation='asentmax' and is now set to 'ssmax'"):
        model(torch.stack(prompts(5)))


def test_switching_to_sdpa_and_back():
    model = tiny_model(position="nape")
    (row,) = prompts(8)
    sparse = alone(model, row)
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(alone(model, row), sparse)
    model.set_attn_implementation("asentmax")
    assert torch.equal(alone(model, row), sparse)


def test_a_model_saved_while_switched_off_is_loaded_as_that(tmp_path):
    model = tiny_model(position="nape")
    (row,) = prompts(8)
    sparse = alone(model, row)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "off")
    off = AutoModelForCausalLM.from_pretrained(tmp_path / "off").eval()
    assert off.config._attn_implementation == "sdpa"
    assert torch.equal(alone(off, row), alone(model, row))
    on = AutoModelForCausalLM.from_pretrained(tmp_path / "off", attn_implementation="asentmax").eval()
    assert torch.equal(alone(on, row), sparse)
    model.set_attn_implementation("asentmax")
    model.save_pretrained(tmp_path / "on")
    assert torch.equal(alone(AutoModelForCausalLM.from_pretrained(tmp_path / "on").eval(), row), sparse)


@pytest.mark.parametrize(
    ("name", "value"),
    [("gamma_range", 1.0), ("positive_gamma", True), ("alibi_layers", 1), ("length_scaling", "none")],
)
def test_settings_that_a_built_model_cannot_follow(name, value):
    model = tiny_model(position="nape")
    (row,) = prompts(8)
    before = alone(model, row)
    model.config.sparse_attention[name] = value
    with pytest.raises(
        ValueError, match=rf"sparse_attention.{name} .* hf_sparse_attention.convert\(model, 'asentmax'"
    ):
        alone(model, row)
    convert(model, "asentmax", **{name: value})
    assert not torch.allclose(alone(model, row), before)


@pytest.mark.parametrize("settings", [None, {"alpha": 1.25}], ids=str)
def test_settings_that_lost_fields_of_a_built_model(settings):
    model = tiny_model(position="nape")
    model.config.sparse_attention = settings
    with pytest.raises(ValueError, match=r"built with sparse_attention.length_scaling 'adaptive'"):
        alone(model, prompts(8)[0])


def test_offloaded_weights(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(tmp_path)
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    options = {"device_map": {**places, "model.layers.1": "disk"}, "offload_folder": tmp_path / "offloaded"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match=r"weights of the model are offloaded.* Convert it without offloading"):
        convert(model)
    assert model.config.sparse_attention is None
    convert(whole := AutoModelForCausalLM.from_pretrained(tmp_path))
    whole.save_pretrained(tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", **options)
    (row,) = prompts(8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(row[None]).logits[0], alone(whole, row))


def test_wrong_field_leaves_the_model_unchanged():
    model = AutoModelForCausalLM.from_config(tiny_config())
    for fields, message in (({"alpha": 3}, "alpha is 3"), ({"alibi_heads": 99, "position_encoding": "nape"}, "99")):
        with pytest.raises(ValueError, match=message):
            convert(model, "asentmax", **fields)
        assert model.config.sparse_attention is None
        assert model.config._attn_implementation == "sdpa"


def test_convert_refuses_what_it_cannot_patch():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no attention layer"):
        convert(gpt2)
    with pytest.raises(TypeError, match="expected a transformers model or a PEFT wrapper"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="attn_implementation is 'entmax15'; allowed: asentmax"):
        convert(AutoModelForCausalLM.from_config(tiny_config()), "entmax15")
    with pytest.raises(ValueError, match="use convert for 'softmax'"):
        revert(tiny_model(), "softmax")


def test_revert_to_what_transformers_does_not_know_changes_nothing():
    model = tiny_model()
    (row,) = prompts(9)
    before, config = alone(model, row), model.config.to_dict()
    with pytest.raises(ValueError, match="sdpaa"):
        revert(model, "sdpaa")
    assert torch.equal(alone(model, row), before)
    assert model.config.to_dict() == config


def test_convert_through_a_peft_wrapper():
    model = get_peft_model(AutoModelForCausalLM.from_config(tiny_config()), LoraConfig(target_modules=["q_proj"]))
    new = convert(model)
    assert len(new) == 8
    assert all(name.startswith("base_model.model.") for name in new)
    (row,) = prompts(5)
    assert alone(model.eval(), row).isfinite().all()
