"""The learned length scale by itself."""

import pytest
import torch

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.length_scale import LengthScale, query_scale

COUNTS = torch.tensor([[[1, 2, 7, 64, 65_536]]])


def scale_of(beta: float, gamma: float, **fields):
    """t of queries that see COUNTS keys, for raw values of beta and gamma."""
    settings = SparseAttentionConfig(length_scaling="learned", **fields)
    scale = LengthScale(settings, hidden_size=8, num_heads=1)
    with torch.no_grad():
        scale.beta.weight.fill_(beta)
        scale.gamma.weight.fill_(gamma)
        return query_scale(settings, *scale(torch.zeros(1, 5, 8)), COUNTS).flatten()


@pytest.mark.parametrize("gamma", [-3.0, -0.4, 0.0, 0.7, 3.0])
@pytest.mark.parametrize("positive", [False, True])
def test_scale_is_the_formula(gamma, positive):
    beta = torch.tensor(0.3)
    power = 1.5 * torch.tanh(torch.tensor(gamma))
    if positive:
        power = 1.5 * (1 + torch.tanh(torch.tensor(gamma))) / 2
    expected = 0.25 + torch.nn.functional.softplus(beta) * torch.log(COUNTS + 1.0).flatten() ** power
    found = scale_of(0.3, gamma, delta=0.25, gamma_range=1.5, positive_gamma=positive)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gamma", [-9.0, -1.0, 0.0, 2.0])
def test_a_positive_gamma_never_lowers_the_scale_of_longer_rows(gamma):
    assert (scale_of(0.5, gamma, positive_gamma=True).diff() >= 0).all()


def test_without_it_the_scale_may_fall():
    assert (scale_of(0.5, -1.0).diff() < 0).all()
