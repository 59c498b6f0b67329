"""One process that has imported the package, for everything that needs a process of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forked, forking

IMPORTS = """
import torch, torch.distributed
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import hf_sparse_attention
"""


@pytest.fixture(scope="session")
def forked(tmp_path_factory) -> Iterator[Forked]:
    """Runs a program in a fork, on one thread of the CPU: forks cannot use a GPU that their parent has looked for."""
    paths = filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    changes = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    with forking(IMPORTS, tmp_path_factory.mktemp("forked"), {**os.environ, **changes}) as run:
        yield run
