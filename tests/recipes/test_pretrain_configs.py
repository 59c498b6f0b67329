"""Every configuration in the repository is read by what it is for, and every model has the size in its name."""

import importlib
import re

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from pretrain_options import DataOptions, ModelOptions, RunOptions
from pretrain_setup import read_model_config
from tiny_run import RECIPES, ROOT
from transformers import AutoModelForCausalLM

from hf_sparse_attention.arguments import load_yaml, parse
from hf_sparse_attention.config import SparseAttentionConfig

CONFIGS = sorted((RECIPES / "configs").glob("*/*.yaml"))
MODELS = [path for path in CONFIGS if path.parent.name == "model"]
TRAINING = [path for path in CONFIGS if path.parent.name == "train"]
ACCELERATE = [path for path in CONFIGS if path.parent.name == "accelerate"]


def ids(paths):
    return [path.stem for path in paths]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_header_is_a_launch_command_with_existing_files(path):
    header = "".join(line[1:].strip() + " " for line in path.read_text().splitlines() if line.startswith("#"))
    assert "accelerate launch" in header
    assert path.relative_to(ROOT).as_posix() in header
    named = re.findall(r"recipes/[\w/]+\.(?:yaml|py)", header)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name
    assert load_yaml(path)


def number(name):
    return float(re.search(r"_(\d+)m$", name)[1]) * 1e6


@pytest.mark.parametrize("path", MODELS, ids=ids(MODELS))
@pytest.mark.parametrize("attention", ["sdpa", "asentmax"])
def test_model_size(path, attention):
    config = read_model_config(ModelOptions(model_config=str(path)))
    assert config.model_type == path.stem.rsplit("_", 1)[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    assert model.num_parameters() == pytest.approx(number(path.stem), rel=0.06)


def test_sizes_span_the_range():
    for family in ("llama", "gpt_neox"):
        sizes = sorted(number(path.stem) for path in MODELS if path.stem.startswith(family))
        assert sizes[0] == 1e6
        assert sizes[-1] == 420e6


def model_options(path):
    """The dataclass of the recipe that the header launches."""
    if "recipes/finetune.py" in path.read_text():
        return importlib.import_module("finetune").FinetuneOptions
    return ModelOptions


@pytest.mark.parametrize("path", TRAINING, ids=ids(TRAINING))
def test_training_options(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [str(path), "--output_dir", "outputs/x"]
    model, data, run = parse(model_options(path), DataOptions, RunOptions, argv=arguments)
    if model.model_config:
        read_model_config(model)
    if model.sparse_attention:
        SparseAttentionConfig.from_dict(model.sparse_attention, preset=model.attn_implementation)
    for source in [*data.train_data, *(data.validation_data or [])]:
        assert not source.startswith("recipes/") or (ROOT / source).is_file()
    for processes in (1, 8) if run.batch_size >= 64 else (1,):
        assert run.batch_size % (run.device_batch_size * processes) == 0


@pytest.mark.parametrize("path", ACCELERATE, ids=ids(ACCELERATE))
def test_accelerate_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.mixed_precision in ("no", "bf16")
    if "FSDP" in str(config.distributed_type):
        fields = yaml.safe_load(path.read_text())["fsdp_config"]
        known = {f"fsdp_{name.removeprefix('fsdp_')}" for name in FullyShardedDataParallelPlugin.__dataclass_fields__}
        known |= {"fsdp_version", "fsdp_offload_params"}  # the latter is the launcher's name of cpu_offload
        assert set(fields) <= known
        assert fields["fsdp_version"] == 2
