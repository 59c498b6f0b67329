"""Attention that is not causal: encoders, and rows whose documents or padding a mask has to separate."""

import pytest
import torch
from families import assert_same, packed, padded, prompts, randomize_scale, tiny_config, tiny_model
from transformers import AutoModel

from hf_sparse_attention.masks import sparse_attention_mask, visibility

LAYERS = {"full": ["full_attention"] * 2, "sliding": ["sliding_attention", "full_attention"]}


def gemma3_encoder(position, layers):
    config = tiny_config(
        "gemma3",
        use_bidirectional_attention=True,
        layer_types=LAYERS[layers],
        attn_implementation="asentmax",
        sparse_attention={"position_encoding": position},
    )
    model = AutoModel.from_config(config).eval()
    randomize_scale(model)
    return model


def llama_encoder(position):
    model = tiny_model(position=position).model
    model.config.is_causal = False
    return model


@torch.no_grad()
def hidden(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).last_hidden_state


def check_padding(model):
    rows = prompts(9, 5)
    expected = [hidden(model, row[None])[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        output = hidden(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        for row in range(2):
            assert_same(output[row][mask[row].bool()], expected[row], f"{side}-padded, row {row}")


@pytest.mark.parametrize("position", ["model", "nape"])
@pytest.mark.parametrize("layers", LAYERS)
def test_padding_in_an_encoder(position, layers):
    check_padding(gemma3_encoder(position, layers))


@pytest.mark.parametrize("position", ["model", "nape"])
def test_padding_in_a_decoder_that_became_an_encoder(position):
    check_padding(llama_encoder(position))


def test_an_encoder_without_positions_does_not_see_the_order():
    model = llama_encoder("nope")
    (row,) = prompts(9)
    order = torch.randperm(9)
    assert_same(hidden(model, row[order][None])[0], hidden(model, row[None])[0][order], "shuffled")


def test_distances_to_later_tokens():
    """An own mask that hides nothing: ALiBi measures from each query, not from the last key it sees."""
    query = torch.zeros(1, 2, 6, 4)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 1] = False
    rows = visibility(
        mask, query, 6, is_causal=True, sliding_window=None, position_ids=None, cu_seqlens=None, seq_idx=None
    )
    assert rows.query_positions[0, [0, 2, 5]].tolist() == [0, 1, 4]
    assert rows.key_positions[0].tolist() == [0, 0, 1, 2, 3, 4]


def test_packed_documents_with_a_window_stay_apart():
    """The window makes transformers build a mask, which has the boundaries of no document."""
    ids, positions = packed(prompts(6, 7))
    mask = sparse_attention_mask(
        batch_size=1,
        q_length=13,
        kv_length=13,
        mask_function=lambda batch, head, query, key: abs(query - key) < 3,
        allow_is_causal_skip=False,
        device=ids.device,
    )
    rows = visibility(
        mask,
        torch.zeros(1, 2, 13, 4),
        13,
        is_causal=False,
        sliding_window=3,
        position_ids=positions,
        cu_seqlens=None,
        seq_idx=None,
    )
    assert rows.key_start[0].tolist() == [0, 0, 0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10]
    assert rows.key_end[0].tolist() == [3, 4, 5, 6, 6, 6, 9, 10, 11, 12, 13, 13, 13]
