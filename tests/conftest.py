"""Every test starts from the same seed, on one thread per process, and needs no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import set_seed
from transformers.utils import logging

logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="Device of the models that tests build in their own process.")


def pytest_configure(config):
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(autouse=True)
def _same_start():
    set_seed(0)
    # Trainer and recipes allow TF32 for all of their process.
    torch.set_float32_matmul_precision("highest")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
