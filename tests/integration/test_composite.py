"""Composite models: the text model gets sparse attention, the vision tower keeps transformers' own."""

import pytest
import torch
import transformers
from packaging import version
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    ColPaliConfig,
    ColPaliForRetrieval,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import hf_sparse_attention  # noqa: F401 - registers the presets

TEXT = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FIELDS = {"position_encoding": "nape"}


def llava(**kwargs):
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_id=60, **kwargs
    )
    return LlavaForConditionalGeneration, config, 4


def gemma3(**kwargs):
    config = Gemma3Config(
        text_config={**TEXT, "layer_types": ["full_attention"] * 2},
        vision_config=SiglipVisionConfig(**VISION).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
        **kwargs,
    )
    return Gemma3ForConditionalGeneration, config, 4


@pytest.fixture(params=[llava, gemma3])
def composite(request, tmp_path):
    model_class, config, image_tokens = request.param()
    model_class(config).save_pretrained(tmp_path / "plain")
    model = model_class.from_pretrained(
        tmp_path / "plain", attn_implementation="asentmax", sparse_attention=FIELDS
    ).eval()
    ids = torch.tensor([[5, *[60] * image_tokens, 7, 8, 9]])
    return model, {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 28, 28),
        "token_type_ids": (ids == 60).long(),
    }


def forward(model, inputs):
    if isinstance(model, LlavaForConditionalGeneration):
        inputs = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def test_only_the_text_model_is_changed(composite):
    model, inputs = composite
    assert model.config.text_config.sparse_attention["position_encoding"] == "nape"
    assert model.config.text_config._attn_implementation == "asentmax"
    assert model.config.vision_config._attn_implementation == "sdpa"
    names = [name for name, _ in model.named_parameters() if ".length_scale." in name]
    assert len(names) == 8
    assert all("language_model" in name for name in names)
    assert forward(model, inputs).isfinite().all()


def test_save_and_load(composite, tmp_path):
    model, inputs = composite
    model.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "sparse").eval()
    assert loaded.config.text_config.sparse_attention == model.config.text_config.sparse_attention
    assert loaded.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(forward(loaded, inputs), forward(model, inputs))


def test_another_preset_and_its_fields_at_loading_time(composite, tmp_path):
    model, _ = composite
    model.save_pretrained(tmp_path / "sparse")
    loaded = type(model).from_pretrained(
        tmp_path / "sparse", attn_implementation="entmax", sparse_attention={"alpha": 1.25}
    )
    settings = loaded.config.text_config.sparse_attention
    assert (settings["preset"], settings["alpha"], settings["position_encoding"]) == ("entmax", 1.25, "nape")


def test_switching_off_and_on(composite, tmp_path):
    model, inputs = composite
    expected = forward(model, inputs)
    model.set_attn_implementation("eager")
    assert not torch.allclose(forward(model, inputs), expected)
    model.save_pretrained(tmp_path / "off")
    loaded = type(model).from_pretrained(tmp_path / "off")
    assert loaded.config.text_config._attn_implementation == "eager"
    model.set_attn_implementation("asentmax")
    assert model.config.text_config._attn_implementation == "asentmax"
    assert model.config.vision_config._attn_implementation == "eager"
    torch.testing.assert_close(forward(model, inputs), expected)
    model.save_pretrained(tmp_path / "on")
    assert type(model).from_pretrained(tmp_path / "on").config.text_config._attn_implementation == "asentmax"


def test_generate(composite):
    model, inputs = composite
    if isinstance(model, LlavaForConditionalGeneration):
        inputs.pop("token_type_ids")
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4


def test_a_text_model_two_levels_down(tmp_path):
    """Or a message, where transformers (before 5.20) keeps two configs of the text model."""
    vlm = {
        "text_config": {"model_type": "gemma", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
    }
    config = ColPaliConfig(vlm_config=PaliGemmaConfig(**vlm, image_token_index=60, projection_dim=48))
    ColPaliForRetrieval(config).save_pretrained(tmp_path / "plain")
    options = {"attn_implementation": "asentmax", "sparse_attention": FIELDS}
    if version.parse(transformers.__version__) < version.parse("5.20"):
        with pytest.raises(ValueError, match="ColPaliForRetrieval has no attention layer"):
            ColPaliForRetrieval.from_pretrained(tmp_path / "plain", **options)
        return
    model = ColPaliForRetrieval.from_pretrained(tmp_path / "plain", **options).eval()
    assert sum(".length_scale." in name for name, _ in model.named_parameters()) == 8
    assert model.config.vlm_config.text_config.sparse_attention["position_encoding"] == "nape"
    ids = torch.tensor([[*[60] * 4, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    model.save_pretrained(tmp_path / "sparse")
    loaded = ColPaliForRetrieval.from_pretrained(tmp_path / "sparse").eval()
    with torch.no_grad():
        expected = model(**inputs).embeddings
        assert torch.equal(loaded(**inputs).embeddings, expected)
        loaded.set_attn_implementation("sdpa")
        assert not torch.allclose(loaded(**inputs).embeddings, expected)
        loaded.set_attn_implementation("asentmax")
        assert torch.equal(loaded(**inputs).embeddings, expected)


def test_a_vision_tower_alone_is_refused():
    config = SiglipVisionConfig(**VISION)
    config._attn_implementation = "asentmax"
    with pytest.raises(ValueError, match=r"no attention layer|built without sparse attention"):
        SiglipVisionModel(config)(torch.randn(1, 3, 28, 28))
