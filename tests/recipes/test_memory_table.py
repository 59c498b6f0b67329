"""The calculated memory of SCALING.md: parameters as models have them, attention as it was measured."""

import dataclasses
import json

import memory_table
import pytest
import torch
from tiny_run import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse_attention  # noqa: F401 - registers the presets

MEASURED = json.loads((ROOT / "model_cards" / "results" / "benchmark_attention.json").read_text())
OURS = [row for row in MEASURED["training"] if row["contestant"].startswith("ours")]


@pytest.mark.parametrize("name", memory_table.SHAPES)
def test_parameters(name):
    shape = memory_table.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**dataclasses.asdict(shape), attn_implementation="asentmax")
        )
    parameters = dict(model.named_parameters())
    assert shape.parameters == sum(parameter.numel() for parameter in parameters.values())
    scales = [parameter.numel() for key, parameter in parameters.items() if ".length_scale." in key]
    assert shape.scale_parameters == sum(scales)
    assert shape.layer_parameters == sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("row", OURS, ids=lambda row: "-".join(str(row[k]) for k in ("length", "head_dim", "batch")))
def test_attention_as_measured(row):
    calculated = memory_table.attention_extra(row["batch"], row["heads"], row["length"], row["head_dim"])
    assert calculated / 2**20 == pytest.approx(row["extra_mib"], rel=0.01)


def test_attention_of_a_long_row_as_measured():
    (row,) = MEASURED["memory"]
    calculated = memory_table.attention_extra(1, row["heads"], row["length"], row["head_dim"])
    assert calculated / 2**20 == pytest.approx(row["extra_mib"], rel=0.001)


@pytest.mark.parametrize(("name", "kind", "gpus"), memory_table.TRAINING)
def test_longest_row(name, kind, gpus):
    shape = memory_table.SHAPES[name]
    length = memory_table.longest_row(shape, kind, gpus)
    limit = memory_table.GPU_GIB * memory_table.GIB
    assert length == 0 or memory_table.training_bytes(shape, kind, gpus, length) <= limit
    assert memory_table.training_bytes(shape, kind, gpus, length + 1024) > limit


def test_page_is_current():
    text = memory_table.PAGE.read_text(encoding="utf-8")
    assert memory_table.page(text, memory_table.tables()) == text
