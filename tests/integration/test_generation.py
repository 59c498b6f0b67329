"""Generation modes beyond greedy decoding of a padded batch, which test_invariance.py covers.

Quantised caches have their tests in test_quantization.py.
"""

import re

import pytest
import torch
from families import CACHE, VOCAB, alone, prompts, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StaticCache, pipeline


def greedy(model, row, steps):
    for _ in range(steps):
        row = torch.cat([row, alone(model, row)[-1].argmax()[None]])
    return row.tolist()


@pytest.fixture(params=["model", "nape"])
def model(request):
    return tiny_model("llama", position=request.param)


def test_static_cache(model):
    (row,) = prompts(7)
    tokens = model.generate(row[None], max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert tokens[0].tolist() == greedy(model, row, 6)


def test_assisted_and_prompt_lookup(model):
    (row,) = prompts(7)
    expected = greedy(model, row, 6)
    assistant = tiny_model("llama", preset="softmax")
    for extra in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(row[None], max_new_tokens=6, do_sample=False, **extra)[0].tolist() == expected


def test_beam_search_scores_are_those_of_the_model(model):
    (row,) = prompts(5)
    out = model.generate(
        row[None], max_new_tokens=3, num_beams=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    tokens = out.sequences[0]
    log_probs = alone(model, tokens).log_softmax(-1)
    total = sum(log_probs[i - 1, tokens[i]] for i in range(5, 8))
    torch.testing.assert_close(out.sequences_scores[0], total / 3, atol=1e-3, rtol=1e-3)


def test_sampling_draws_from_the_distribution_of_the_model(model):
    (row,) = prompts(5)
    torch.manual_seed(5)
    generated = model.generate(row[None], max_new_tokens=6, do_sample=True, top_k=0)
    torch.manual_seed(5)
    for _ in range(6):
        row = torch.cat([row, torch.multinomial(alone(model, row)[-1].softmax(-1), 1)])
    assert generated[0].tolist() == row.tolist()


def test_compiled_decode_on_a_static_cache(model):
    (row,) = prompts(6)
    cache = StaticCache(config=model.config, max_cache_len=16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = alone(model, torch.cat([row, row]))
    with torch.no_grad():
        model(row[None], **{CACHE: cache}, position_ids=torch.arange(6)[None])
        for step, token in enumerate(row):
            positions = torch.tensor([[6 + step]])
            logits = compiled(token.view(1, 1), **{CACHE: cache}, position_ids=positions).logits[0, 0]
            torch.testing.assert_close(logits, expected[6 + step], atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache(model, implementation):
    model = model.cuda()
    row = prompts(7)[0].cuda()
    # Compiling the static one's copies crashes torch 2.11, whatever the attention.
    options = {"do_sample": False, "cache_implementation": implementation, "disable_compile": True}
    tokens = model.generate(row[None], max_new_tokens=6, **options)
    assert tokens[0].tolist() == greedy(model, row, 6)


def test_pipeline_in_batches(model):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCAB)}, unk_token="<1>")),
        pad_token="<0>",
        padding_side="left",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rows = prompts(5, 9, 3)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device)
    answers = generate(
        [tokenizer.decode(row) for row in rows], batch_size=3, max_new_tokens=4, max_length=None, do_sample=False
    )
    for row, (answer,) in zip(rows, answers):
        tokens = [int(number) for number in re.findall(r"\d+", answer["generated_text"])]
        # Texts leave out padding tokens.
        assert tokens == [token for token in greedy(model, row, 4) if token != 0]


def test_continuous_batching_is_refused(model):
    message = r"no paged cache, which generate_batch.* Use model.generate with a left-padded batch"
    with pytest.raises(ValueError, match=message):
        model.generate_batch([[3, 4, 5]])
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching()
