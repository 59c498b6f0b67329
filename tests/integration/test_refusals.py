"""What is not supported stops with a message that says what to do; nothing is ignored."""

import pytest
import torch
from families import CACHE, packed, prompts, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    GptOssConfig,
    GptOssForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

TINY = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def test_softcapping():
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=50.0.*attn_logit_softcapping = None"):
        AutoModelForCausalLM.from_config(
            tiny_config("gemma2", attn_logit_softcapping=50.0), attn_implementation="asentmax"
        )


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (GptOssForCausalLM, GptOssConfig(**TINY, num_key_value_heads=2, head_dim=8, num_local_experts=2)),
        (T5ForConditionalGeneration, T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2)),
        (BertLMHeadModel, BertConfig(**TINY, is_decoder=True, add_cross_attention=True)),
    ],
    ids=["attention sinks", "relative position bias", "cross-attention"],
)
def test_unsupported_architectures(model_class, config):
    config._attn_implementation = "asentmax"
    with pytest.raises(ValueError, match="has no attention layer that attn_implementation='asentmax' can be attached"):
        model_class(config)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias", "head_mask", "anything"])
def test_unknown_keywords(keyword):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"does not support the keyword {keyword!r}"):
        model(torch.stack(prompts(5)), **{keyword: torch.ones(1)})


def test_additive_biases_in_a_mask():
    model = tiny_model()
    bias = torch.zeros(1, 1, 5, 5)
    bias[..., 2] = -0.5
    with pytest.raises(ValueError, match="additive biases are not supported"):
        model(torch.stack(prompts(5)), attention_mask=bias, use_cache=False)


def test_mask_of_another_shape():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 5, 4\); expected"):
        model(torch.stack(prompts(5)), attention_mask=torch.ones(1, 1, 5, 4, dtype=torch.bool), use_cache=False)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens", "seq_idx"])
def test_going_on_from_a_packed_cache(boundaries, padding):
    model = tiny_model()
    ids, positions = packed(prompts(5, 4))
    bounds = torch.tensor([0, 5, 9])
    given = {
        "position_ids": {"position_ids": positions},
        "cu_seq_lens": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
        "seq_idx": {"seq_idx": torch.tensor([[0] * 5 + [1] * 4])},
    }[boundaries]
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    cache = DynamicCache(config=model.config)
    position = 4 if boundaries == "position_ids" else 9
    new = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1), "position_ids": torch.tensor([[position]])}
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE: cache}, **given)
        with pytest.raises(ValueError, match="cache was filled from a row of packed documents"):
            model(torch.tensor([[7]]), **{CACHE: cache}, **new)
        # Your own mask can say what the cache does not.
        own = (torch.arange(10) >= 5)[None, None, None]
        logits = model(torch.tensor([[7]]), **{CACHE: cache}, **{**new, "attention_mask": own}).logits[0]
        document = torch.cat([ids[0, 5:], torch.tensor([7])])
        torch.testing.assert_close(logits[-1], model(document[None]).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_a_cache_that_was_emptied_is_as_good_as_new():
    model = tiny_model()
    ids, positions = packed(prompts(5, 4))
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(ids, position_ids=positions, **{CACHE: cache})
        cache.reset()
        model(ids[:, :5], **{CACHE: cache})
        new = model(ids[:, 5:6], position_ids=torch.tensor([[5]]), **{CACHE: cache}).logits[0, -1]
        torch.testing.assert_close(new, model(ids[:, :6]).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_cumulative_lengths_that_cannot_be_applied():
    model = tiny_model()
    bounds = torch.tensor([0, 2, 5])
    ids = torch.stack(prompts(5, 5))
    with pytest.raises(ValueError, match="cu_seq_lens_q describes one flattened row"):
        model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False)
    with pytest.raises(ValueError, match="cu_seq_lens_k differs"):
        model(ids[:1], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds[:2], use_cache=False)
    with pytest.raises(ValueError, match="cu_seq_lens_k differs"):
        model(ids[:1], cu_seq_lens_q=bounds, cu_seq_lens_k=torch.tensor([0, 3, 5]), use_cache=False)


@pytest.mark.parametrize("bounds", [[0, 2, 4], [1, 3, 5], [0, 4, 2, 5], [0, 2, 9], [0, -2, 5], [5]])
def test_cumulative_lengths_that_do_not_cover_the_row(bounds):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"cu_seq_lens_q (must ascend from 0 to|has shape \(1,\))"):
        model(prompts(5)[0][None], cu_seq_lens_q=torch.tensor(bounds), use_cache=False)


def test_documents_without_tokens_are_none():
    model = tiny_model()
    ids = prompts(5)[0][None]
    with torch.no_grad():
        expected, found = (
            model(ids, cu_seq_lens_q=torch.tensor(bounds), use_cache=False).logits
            for bounds in ([0, 2, 5], [0, 0, 2, 2, 5, 5])
        )
    assert torch.equal(found, expected)


def test_continuous_batching():
    model = tiny_model()
    with pytest.raises(ValueError, match="no paged cache, which generate_batch"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
