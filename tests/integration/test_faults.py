"""Broken checkpoints, weights and settings: an error that names file or field, never a silent default."""

import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from families import FAMILIES, alone, prompts, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_sparse_attention import PRESETS, SparseAttentionConfig
from hf_sparse_attention.config import ALIBI_SLOPES, BACKENDS, LENGTH_SCALINGS, POSITION_ENCODINGS
from hf_sparse_attention.evaluation.checkpoints import CheckpointError, CheckpointSpec, load_model
from hf_sparse_attention.loading import check_finite, naming_broken_files

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of one model saved whole and in shards."""
    root = tmp_path_factory.mktemp("saved")
    model = tiny_model(position="nape")
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "shards", max_shard_size="40KB")
    return root


def change(path, edit):
    path.write_bytes(edit(path.read_bytes()))


def flip(index):
    return lambda data: data[:index] + bytes([data[index] ^ 0x80]) + data[index + 1 :]


def shift_a_tensor(data):
    """Another offset in a header that stays valid JSON."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    entry = next(value for key, value in header.items() if key != "__metadata__")
    entry["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    ("source", "name", "edit"),
    [
        ("whole", WEIGHTS, lambda data: data[:-100]),
        ("whole", WEIGHTS, lambda data: data[:50]),
        ("whole", WEIGHTS, lambda data: b""),
        ("whole", WEIGHTS, flip(3)),
        ("whole", WEIGHTS, flip(8)),
        ("whole", WEIGHTS, flip(900)),
        ("whole", WEIGHTS, shift_a_tensor),
        ("whole", "config.json", lambda data: data[:200]),
        ("whole", "config.json", lambda data: b"\x80\x81"),
        ("shards", "model-00002-of-00004.safetensors", lambda data: data[:-4]),
        ("shards", INDEX, lambda data: data[:100]),
    ],
    ids=[
        "cut-data",
        "cut-header",
        "empty",
        "flip-length",
        "flip-brace",
        "flip-name",
        "moved-tensor",
        "cut-config",
        "binary-config",
        "cut-shard",
        "cut-index",
    ],
)
def test_a_broken_file_is_named(saved, tmp_path, source, name, edit):
    shutil.copytree(saved / source, tmp_path / "model")
    change(tmp_path / "model" / name, edit)
    with pytest.raises(OSError, match=name), naming_broken_files(tmp_path / "model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("whole", WEIGHTS, WEIGHTS),
        ("whole", "config.json", "config.json"),
        ("shards", "model-00003-of-00004.safetensors", "model-00003-of-00004.safetensors"),
        ("shards", INDEX, "no file named model.safetensors"),
    ],
    ids=["weights", "config", "shard", "index"],
)
def test_a_missing_file_is_named(saved, tmp_path, source, name, message):
    shutil.copytree(saved / source, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises((OSError, ValueError), match=message), naming_broken_files(tmp_path / "model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_weights_that_do_not_fit_the_config(saved, tmp_path):
    shutil.copytree(saved / "whole", tmp_path / "model")
    change(tmp_path / "model" / "config.json", lambda data: data.replace(b'"vocab_size": 61', b'"vocab_size": 80'))
    with pytest.raises(OSError, match=str(tmp_path / "model")), naming_broken_files(tmp_path / "model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_pickled_checkpoint_runs_no_code(saved, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    shutil.copytree(saved / "whole", tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).unlink()
    torch.save({"weight": Payload()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", ["q_proj.weight", "length_scale.beta_proj.bias"])
def test_a_nonfinite_weight_is_named(tmp_path, name, value):
    model = tiny_model(position="nape")
    name = f"model.layers.1.self_attn.{name}"
    check_finite(model, tmp_path)
    model.get_parameter(name).data.view(-1)[-1] = value
    with pytest.raises(OSError, match=f"{tmp_path}: the weight {name} holds NaN or infinite values"):
        check_finite(model, tmp_path)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_nan_is_not_hidden(family, alpha, backend):
    """One head's length scale is NaN: the logits are, for every position that sees it."""
    model = tiny_model(family)
    model.config.sparse_attention |= {"alpha": alpha, "backend": backend}
    next(p for n, p in model.named_parameters() if n.endswith("beta_proj.bias")).data[-1] = math.nan
    (row,) = prompts(9)
    assert alone(model, row).isnan().all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [(lambda data: data[:-4], WEIGHTS), (lambda data: data[:-4] + struct.pack("<f", math.nan), "lm_head|norm|proj")],
    ids=["cut", "nan"],
)
def test_recipes_name_what_is_broken(saved, tmp_path, monkeypatch, edit, message):
    """Both ways in which a recipe loads a model; their programs print such errors in one line."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    from pretrain_options import ModelOptions
    from pretrain_setup import build_model

    path = tmp_path / "model"
    shutil.copytree(saved / "whole", path)
    change(path / WEIGHTS, edit)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(OSError, match=f"{path}.*({message})"):
        build_model(ModelOptions(model_name_or_path=str(path)), words, 16)
    with pytest.raises(CheckpointError, match=f"{path}.*({message})"):
        load_model(CheckpointSpec("broken", str(path)), words, train_length=8, max_length=8)


FIELDS = list(SparseAttentionConfig().to_dict())
CHOICES = (*PRESETS, *LENGTH_SCALINGS, *POSITION_ENCODINGS, *ALIBI_SLOPES, *BACKENDS)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 2, 3, 6, 7, 10**400, -1]),
    st.floats(),
    st.floats(1, 2),
    st.sampled_from(CHOICES),
    st.text(max_size=5),
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
RANDOM_SETTINGS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)
LIKELY_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.sampled_from(list(PRESETS)),
        "alpha": st.floats(1, 2) | st.just(1),
        "length_scaling": st.sampled_from(LENGTH_SCALINGS),
        "top_k": st.none() | st.integers(1, 9),
        "delta": st.floats(0, 3),
        "gamma_range": st.floats(0, 8),
        "projection_bias": st.booleans(),
        "beta_bias_init": st.floats(-100, 100),
        "position_encoding": st.sampled_from(POSITION_ENCODINGS),
        "alibi_heads": st.none() | st.integers(1, 9),
        "alibi_layers": st.integers(0, 3),
        "alibi_slopes": st.sampled_from(ALIBI_SLOPES),
        "scale_alibi_heads": st.none() | st.booleans(),
        "backend": st.sampled_from(("auto", "chunked", "reference")),
    },
)


def check_error(error, values):
    """Raised by the package's own validation, and about one of the fields that were given."""
    assert any(f"sparse_attention.{name} is " in str(error) for name in values), (error, values)


def check_kept(actual, values):
    for name, value in values.items():
        assert value is None or (actual[name] == value and type(actual[name]) in (type(value), float)), name


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(values=RANDOM_SETTINGS | LIKELY_SETTINGS)
def test_any_settings_are_kept_or_refused_by_name(values):
    try:
        accepted = SparseAttentionConfig.from_dict(values)
    except ValueError as error:
        check_error(error, values)
    else:
        check_kept(accepted.to_dict(), values)
        assert SparseAttentionConfig.from_dict(json.loads(json.dumps(accepted.to_dict()))) == accepted


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(name=st.text(max_size=12) | st.integers() | st.none(), value=SCALARS)
def test_unknown_fields_are_named(name, value):
    if name in FIELDS:
        return
    with pytest.raises(ValueError, match="sparse_attention has no field") as raised:
        SparseAttentionConfig.from_dict({name: value})
    assert repr(name) in str(raised.value)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(values=LIKELY_SETTINGS, family=st.sampled_from(list(FAMILIES)))
def test_models_of_any_settings_are_finite_or_refused_by_name(values, family):
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(family, sparse_attention=values))
    except ValueError as error:
        check_error(error, values)
        return
    check_kept(model.config.sparse_attention, values)
    assert model.config._attn_implementation == values.get("preset", "asentmax")
    (row,) = prompts(7)
    assert alone(model.eval(), row).isfinite().all()


@pytest.mark.parametrize("value", [[1.5], {"a": 1}, "1.5"], ids=str)
def test_a_setting_that_is_broken_after_construction(value):
    model = tiny_model()
    model.config.sparse_attention["alpha"] = value
    with pytest.raises(ValueError, match=r"sparse_attention.alpha is "):
        alone(model, prompts(5)[0])
