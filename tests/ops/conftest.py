"""Operators are tested in memory full of NaN: reading what was never written shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)
