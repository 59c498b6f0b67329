"""Training in this process: a tiny model on a small text, with accelerate's state forgotten between runs."""

import json
import sys
from pathlib import Path

import datasets
import pytest
from tiny_run import RECIPES, TINY_MODEL, as_flags, forget_accelerate

# The recipes are scripts: their folder is the import path when they are launched.
sys.path.insert(0, str(RECIPES))


@pytest.fixture(scope="session", autouse=True)
def _own_datasets_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    yield
    patch.undo()


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Sixteen documents of about a thousand characters."""
    text = (RECIPES / "data" / "haystack.txt").read_text(encoding="utf-8")
    return [text[start : start + 900 + 17 * start // 1000] for start in range(0, 16000, 1000)]


@pytest.fixture(scope="session")
def text_file(documents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_options(text_file) -> dict:
    """Options of pretrain.py: ten steps of 4 rows of 33 tokens, a checkpoint every 3."""
    return {
        "model_config": str(RECIPES / "configs" / "model" / "llama_1m.yaml"),
        "model_overrides": TINY_MODEL,
        "train_data": [str(text_file)],
        "attn_implementation": "asentmax",
        "sparse_attention": {"position_encoding": "nape"},
        "length": 33,
        "shuffle_tokens": 900,
        "max_steps": 10,
        "batch_size": 4,
        "device_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 3,
    }


@pytest.fixture(scope="session")
def pretrain(tiny_options):
    """Run pretrain.py in this process with the tiny options and changes."""
    import pretrain as recipe

    def run(output: Path, **changes) -> Path:
        forget_accelerate()
        try:
            recipe.main(as_flags({**tiny_options, "output_dir": str(output), **changes}))
        finally:
            forget_accelerate()
        return output

    return run


@pytest.fixture(scope="session")
def trained(pretrain, tmp_path_factory) -> Path:
    """An undisturbed run."""
    return pretrain(tmp_path_factory.mktemp("trained") / "run", keep_checkpoints=9)
