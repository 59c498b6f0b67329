"""Every supported family: build, train step, save and load, output_attentions."""

import pytest
import torch
from families import FAMILIES, alone, assert_same, prompts, tiny_config, tiny_model
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_train_step_reaches_every_parameter(family):
    model = tiny_model(family, position="nape").train()
    ids = torch.stack(prompts(11, 11))
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without_gradient == []
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".length_scale." in n)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert model(ids, labels=ids, use_cache=False).loss < loss


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    model = tiny_model(family, position="nape")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    (row,) = prompts(9)
    assert loaded.config._attn_implementation == "asentmax"
    assert loaded.config.sparse_attention == model.config.sparse_attention
    assert loaded.config.architectures == [type(model).__name__]
    assert torch.equal(alone(loaded, row), alone(model, row))


@pytest.mark.parametrize("family", FAMILIES)
def test_first_layers_with_alibi_on_all_heads(family):
    (row,) = prompts(12)

    def logits(**fields):
        torch.manual_seed(0)
        model = tiny_model(family, position=fields)
        return alone(model, row)

    everywhere = logits(position_encoding="alibi", scale_alibi_heads=False)
    nape = {"position_encoding": "nape"}
    assert torch.equal(logits(**nape, alibi_layers=2), everywhere)
    assert torch.equal(logits(**nape, alibi_layers=0), logits(**nape))
    first = logits(**nape, alibi_layers=1)
    assert not torch.allclose(first, everywhere)
    assert not torch.allclose(first, logits(**nape))


@pytest.mark.parametrize("family", FAMILIES)
def test_output_attentions(family):
    model = tiny_model(family)
    (row,) = prompts(8)
    with torch.no_grad():
        attentions = model(row[None], output_attentions=True, use_cache=False).attentions
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape == (1, 6, 8, 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6, 8))
        assert weights.triu(1).abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_preset_equals_eager(family):
    """The control preset computes what the architecture computes: the plumbing changes nothing by itself."""
    model = tiny_model(family, preset="softmax")
    eager = AutoModelForCausalLM.from_config(tiny_config(family, attn_implementation="eager")).eval()
    eager.load_state_dict(model.state_dict())
    (row,) = prompts(12)
    assert_same(alone(model, row), alone(eager, row), family)
