"""Long rows need no mask of length x length: neither plain ones nor packed ones with document numbers."""

import pytest
import torch
from families import alone, prompts, tiny_model

from hf_sparse_attention import attention


@pytest.mark.parametrize("position", ["model", "nape"])
def test_no_mask_is_built(position, monkeypatch):
    masks, original = [], attention.visibility
    monkeypatch.setattr(
        attention, "visibility", lambda mask, *args, **kwargs: masks.append(mask) or original(mask, *args, **kwargs)
    )
    model, documents = tiny_model(position=position), prompts(13, 8)
    row = torch.cat(documents)[None]
    numbers = torch.tensor([0] * 13 + [1] * 8)[None]
    logits = model(row, seq_idx=numbers, use_cache=False).logits[0]
    expected = torch.cat([alone(model, document) for document in documents])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert masks == [None] * len(masks)
    assert len(masks) == 3 * model.config.num_hidden_layers
