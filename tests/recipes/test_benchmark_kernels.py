"""The GPU benchmark on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [([], "needs a CUDA device"), (["--sections", "speed"], "sections: 'speed' is not known")],
    ids=["no GPU", "unknown section"],
)
def test_says_what_is_wrong(options, message):
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "recipes" / "benchmark_kernels.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
