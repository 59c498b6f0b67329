"""Running pretrain.py with a tiny model, in this process or another, and reading what it wrote."""

import json
import shutil
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM

from hf_sparse_attention.checkpoints import list_checkpoints

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"

TINY_MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def as_flags(options: dict) -> list[str]:
    flags = []
    for name, value in options.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, dict):
            flags.append(json.dumps(value))
        else:
            flags += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return flags


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def read_metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("tokens_per_second", "memory_gb")}
        for line in lines
    ]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(left, right):
    left, right = weights(left), weights(right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def copy_until(trained, output, step):
    """The run as it was on disk after ``step``."""
    shutil.copytree(trained, output)
    for path in list_checkpoints(output):
        if int(path.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(path)
    for name in ("model.safetensors", "config.json", "README.md"):
        (output / name).unlink()
    return output
