"""SparseAttentionConfig: defaults by preset, errors that name the field, every way in and out of a model's config."""

import dataclasses
import json

import pytest
from families import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from hf_sparse_attention import PRESETS, SparseAttentionConfig, convert
from hf_sparse_attention.hub import TrustedCheckpoint


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_defaults(preset):
    settings = SparseAttentionConfig(preset=preset)
    assert {name: getattr(settings, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert SparseAttentionConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alfa": 1.5}, r"no field 'alfa' \(value 1.5\). Did you mean 'alpha'"),
        ({"alpha": 2.5}, r"sparse_attention.alpha is 2.5; allowed: a number in \[1.0, 2.0\]"),
        ({"alpha": "1.5"}, r"alpha is '1.5'"),
        ({"alpha": True}, r"alpha is True"),
        ({"alpha": float("nan")}, r"alpha is nan"),
        ({"preset": "softmax", "alpha": 1.5}, r"alpha is 1.5; allowed: 1 for the preset softmax"),
        ({"preset": "soft"}, r"preset is 'soft'; allowed: asentmax, entmax"),
        ({"length_scaling": "cubic"}, r"length_scaling is 'cubic'; allowed: adaptive, learned, log, none"),
        ({"position_encoding": ["nape"]}, r"position_encoding is \['nape'\]"),
        ({"gamma_range": -1}, r"gamma_range is -1"),
        ({"delta": float("inf")}, r"delta is inf"),
        ({"projection_bias": 1}, r"projection_bias is 1; allowed: true or false"),
        ({"positive_gamma": 0}, r"positive_gamma is 0; allowed: true or false"),
        ({"top_k": 4}, r"top_k is 4; allowed: null for every preset but topk"),
        ({"preset": "topk", "top_k": 0}, r"top_k is 0; allowed: an integer of at least 1"),
        ({"alibi_heads": 2}, r"alibi_heads is 2; allowed: null unless position_encoding is nape"),
        ({"alibi_layers": 1}, r"alibi_layers is 1; allowed: 0 unless position_encoding is nape"),
        (
            {"alibi_layers": True, "position_encoding": "nape"},
            r"alibi_layers is True; allowed: an integer of at least 0",
        ),
        ({"alibi_slopes": "steep"}, r"alibi_slopes is 'steep'"),
        ({"backend": "cuda"}, r"backend is 'cuda'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseAttentionConfig.from_dict(fields)
    config = tiny_config(sparse_attention=fields)
    config._attn_implementation = fields.get("preset") if fields.get("preset") in PRESETS else "asentmax"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(config)


def test_settings_that_are_no_mapping():
    with pytest.raises(TypeError, match="sparse_attention must be a mapping of fields, got str"):
        AutoModelForCausalLM.from_config(tiny_config(sparse_attention="nape", attn_implementation="asentmax"))


@pytest.mark.parametrize(
    ("name", "value", "allowed"), [("alibi_heads", 7, "6 query heads"), ("alibi_layers", 3, "2 layers")]
)
def test_more_alibi_than_the_model_has(name, value, allowed):
    message = f"{name} is {value}; allowed: at most the {allowed} of the model"
    fields = {"position_encoding": "nape", name: value}
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(tiny_config(sparse_attention=fields))
    with pytest.raises(ValueError, match=message):
        convert(AutoModelForCausalLM.from_config(tiny_config()), **fields)


def test_every_field_has_help_and_a_json_scalar():
    for field in dataclasses.fields(SparseAttentionConfig):
        assert field.metadata["help"]
    values = SparseAttentionConfig().to_dict().values()
    assert all(value is None or isinstance(value, str | int | float | bool) for value in values)


class TestWaysIn:
    """Every way to ask for sparse attention gives the same model."""

    fields = {"position_encoding": "nape", "alpha": 1.25}  # noqa: RUF012

    @pytest.fixture
    def plain(self, tmp_path):
        AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(tmp_path / "plain")
        return tmp_path / "plain"

    def check(self, model, tmp_path):
        expected = SparseAttentionConfig(**self.fields).to_dict()
        assert model.config.sparse_attention == expected
        assert model.config._attn_implementation == "asentmax"
        assert any(name.endswith("length_scale.beta_proj.weight") for name, _ in model.named_parameters())
        model.save_pretrained(tmp_path / "again")
        for loaded in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
            LlamaForCausalLM.from_pretrained(tmp_path / "again"),
            LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path / "again")),
        ):
            assert loaded.config.sparse_attention == expected
            assert loaded.config._attn_implementation == "asentmax"

    def test_config_from_pretrained(self, plain, tmp_path):
        config = AutoConfig.from_pretrained(plain, sparse_attention=self.fields)
        self.check(AutoModelForCausalLM.from_config(config), tmp_path)

    def test_model_from_pretrained(self, plain, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(
            plain, attn_implementation="asentmax", sparse_attention=self.fields
        )
        self.check(model, tmp_path)

    def test_direct_construction(self, tmp_path):
        self.check(LlamaForCausalLM(tiny_config(sparse_attention=self.fields)), tmp_path)

    def test_from_config_with_attn_implementation(self, tmp_path):
        config = tiny_config(sparse_attention=self.fields)
        self.check(AutoModelForCausalLM.from_config(config, attn_implementation="asentmax"), tmp_path)


def test_loading_with_some_fields_keeps_the_others(tmp_path):
    tiny_model(position="nape").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention={"alpha": 2.0})
    assert model.config.sparse_attention["alpha"] == 2.0
    assert model.config.sparse_attention["position_encoding"] == "nape"


def test_another_preset_at_loading_time(tmp_path):
    tiny_model(position="nape").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="softmax")
    settings = model.config.sparse_attention
    assert (settings["preset"], settings["alpha"], settings["length_scaling"]) == ("softmax", 1.0, "none")
    assert settings["position_encoding"] == "nape"


def test_another_preset_and_its_fields_at_loading_time(tmp_path):
    """The fields are the new preset's: alpha is not lost with the alpha of the stored one."""
    tiny_model(position="nape").save_pretrained(tmp_path)
    given = {"attn_implementation": "entmax", "sparse_attention": {"alpha": 1.25}}
    trusted = type("LlamaForCausalLM", (TrustedCheckpoint, LlamaForCausalLM), {})
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path, **given),
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, **given)),
        trusted.from_pretrained(
            tmp_path,
            config=AutoConfig.from_pretrained(tmp_path, attn_implementation="entmax"),
            sparse_attention={"alpha": 1.25},
        ),
    ):
        settings = model.config.sparse_attention
        assert (settings["preset"], settings["alpha"], settings["length_scaling"]) == ("entmax", 1.25, "none")
        assert settings["position_encoding"] == "nape"
