"""Whether float32 products are rounded, asked for through either interface of PyTorch."""

import pytest
import torch

from hf_sparse_attention.ops.precision import multiplies_in_tf32

MATMUL = torch.backends.cuda.matmul
NEW = hasattr(MATMUL, "fp32_precision")


def set_new(precision: str) -> None:
    """As transformers' Trainer does."""
    torch.backends.fp32_precision = precision


WAYS = {
    "legacy": lambda rounded: setattr(MATMUL, "allow_tf32", rounded),
    "float32_matmul_precision": lambda rounded: torch.set_float32_matmul_precision("high" if rounded else "highest"),
    **({"fp32_precision": lambda rounded: set_new("tf32" if rounded else "ieee")} if NEW else {}),
}


@pytest.fixture(autouse=True)
def _own_precision():
    if NEW:
        MATMUL.fp32_precision = "none"
    yield
    if NEW:
        set_new("none")
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("ask", WAYS.values(), ids=WAYS)
def test_both_interfaces_are_read(ask):
    assert not multiplies_in_tf32()
    ask(True)
    assert multiplies_in_tf32()
    ask(False)
    assert not multiplies_in_tf32()
