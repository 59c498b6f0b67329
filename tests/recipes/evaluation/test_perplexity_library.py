"""Perplexity windows and losses against a computation by hand."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from hf_sparse_attention.evaluation.checkpoints import (
    CheckpointError,
    CheckpointSpec,
    load_model,
    parse_specs,
    tokenizer_fingerprint,
)
from hf_sparse_attention.evaluation.perplexity import (
    PerplexityPlan,
    make_windows,
    run_plan,
    summarize_positions,
    unigram_perplexity,
)

PLAN = PerplexityPlan(lengths=(9, 17, 59), target_tokens=5, stride=7)


def log_probs(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def by_hand(model, documents, plan, length):
    """Summed target loss of each document at one length, one window at a time."""
    text = plan.max_length - (plan.bos_id is not None)
    sums = {}
    for number, ids in enumerate(documents):
        for end in range(text, len(ids) + 1, plan.stride):
            window = ids[end - length : end] if plan.bos_id is None else [plan.bos_id, *ids[end - length + 1 : end]]
            scores = log_probs(model, window)
            for position in range(length - plan.target_tokens, length):
                sums[number] = sums.get(number, 0.0) - scores[position - 1, window[position]].item()
    return sums


@pytest.fixture(params=["softmax", "asentmax"])
def model(request):
    return AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"{request.param}_checkpoint")).eval()


@pytest.mark.parametrize("bos_id", [None, 0], ids=["no_bos", "bos"])
def test_losses_equal_a_computation_by_hand(model, documents, bos_id):
    plan = PerplexityPlan(lengths=PLAN.lengths, target_tokens=5, stride=7, bos_id=bos_id)
    losses = [loss for loss in run_plan(model, documents, plan, batch_tokens=100) if loss.bucket is None]
    for length in plan.lengths:
        expected = by_hand(model, documents, plan, length)
        for number, nll in expected.items():
            found = sum(loss.nll for loss in losses if (loss.document, loss.length) == (number, length))
            assert found == pytest.approx(nll, rel=1e-5)
    windows = make_windows(documents, plan)
    assert sum(loss.tokens for loss in losses) == len(windows) * 5 * len(plan.lengths)


def test_losses_by_position_equal_a_computation_by_hand(model, documents):
    summary = summarize_positions(run_plan(model, documents, PLAN), PLAN)
    # One non-overlapping window fits into documents of 61 and 97 tokens, two into 133.
    starts = [(0, 0), (1, 0), (1, 63), (2, 0)]
    losses = {}
    for number, start in starts:
        window = documents[number][start : start + 59]
        scores = log_probs(model, window)
        for position in range(1, 59):
            losses.setdefault(position, []).append(-scores[position - 1, window[position]].item())
    assert [(bucket["first"], bucket["last"]) for bucket in summary] == [(1, 15), (16, 31), (32, 58)]
    for bucket in summary:
        values = [x for p in range(bucket["first"], bucket["last"] + 1) for x in losses[p]]
        assert bucket["tokens"] == len(values)
        assert bucket["loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_positions_of_wide_buckets_are_sampled(softmax_checkpoint, documents):
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint).eval()
    plan = PerplexityPlan(lengths=(9, 59), target_tokens=5, stride=7, positions_per_bucket=4)
    assert [bucket["tokens"] for bucket in summarize_positions(run_plan(model, documents, plan), plan)] == [16, 16, 16]


def test_shares_of_three_processes_make_up_one(softmax_checkpoint, documents):
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint).eval()
    whole = run_plan(model, documents, PLAN, batch_tokens=120)
    shares = [
        loss
        for rank in range(3)
        for loss in run_plan(model, documents, PLAN, batch_tokens=120, process=rank, processes=3)
    ]
    assert sorted(map(repr, whole)) == sorted(map(repr, shares))


def test_windows_end_alike_and_skip_short_documents(documents):
    windows = make_windows([[1] * 58, *documents], PLAN)
    assert {window.document for window in windows} == {1, 2, 3}
    assert [w.end for w in windows if w.document == 3] == [59, 66, 73, 80, 87, 94]
    assert [w.end for w in windows if w.document == 2 and w.whole] == [59, 122]
    limited = PerplexityPlan(lengths=(59,), target_tokens=5, stride=7, windows_per_document=2)
    assert len(make_windows(documents, limited)) == 1 + 2 + 2


def test_text_too_short_for_the_longest_length():
    with pytest.raises(ValueError, match=r"length 59: its longest document has 40 tokens"):
        make_windows([[1] * 40], PLAN)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lengths": (17, 9)}, "lengths"),
        ({"lengths": (1, 9)}, "lengths"),
        ({"target_tokens": 9}, "target_tokens"),
        ({"target_tokens": 0}, "target_tokens"),
        ({"stride": 4}, "stride"),
        ({"windows_per_document": 0}, "windows_per_document"),
    ],
)
def test_plan_errors_name_the_field(changes, field):
    with pytest.raises(ValueError, match=field):
        PerplexityPlan(**{"lengths": (9, 17), "target_tokens": 5, "stride": 7, **changes})


def test_a_loss_that_is_not_finite_is_an_error(softmax_checkpoint, documents):
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint).eval()
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="length 9 is not a finite number"):
        run_plan(model, documents, PLAN)


def test_unigram_perplexity():
    assert unigram_perplexity([[1, 1, 2, 3], [2, 3, 4, 4]]) == pytest.approx(4.0)
    assert unigram_perplexity([[5, 5, 5]]) == pytest.approx(1.0)


def test_yarn_is_that_of_transformers(softmax_checkpoint, tokenizer, documents):
    spec = CheckpointSpec("m", str(softmax_checkpoint), "yarn")
    stretched = load_model(spec, tokenizer, train_length=24, max_length=96)
    plain = AutoModelForCausalLM.from_pretrained(softmax_checkpoint)
    config = LlamaConfig(
        **{
            **plain.config.to_dict(),
            "max_position_embeddings": 96,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
            },
        }
    )
    reference = AutoModelForCausalLM.from_config(config).eval()
    reference.load_state_dict(plain.state_dict())
    ids = documents[1][:90]
    torch.testing.assert_close(log_probs(stretched, ids), log_probs(reference, ids))
    assert not torch.allclose(log_probs(stretched, ids), log_probs(plain.eval(), ids), atol=1e-3)


def test_dynamic_ntk_does_not_depend_on_what_was_read_before(softmax_checkpoint, tokenizer, documents):
    spec = CheckpointSpec("m", str(softmax_checkpoint), "dynamic")
    model = load_model(spec, tokenizer, train_length=24, max_length=96)
    plan = PerplexityPlan(lengths=(40,), target_tokens=5, stride=7)
    first = run_plan(model, documents, plan)
    run_plan(model, documents, PerplexityPlan(lengths=(90,), target_tokens=5, stride=7))
    assert run_plan(model, documents, plan) == first
    plain = AutoModelForCausalLM.from_pretrained(softmax_checkpoint).eval()
    assert run_plan(plain, documents, plan) != first
    short = PerplexityPlan(lengths=(20,), target_tokens=5, stride=7)
    assert run_plan(model, documents, short) == run_plan(plain, documents, short)


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_there_is_no_rope_to_scale_under_nape(asentmax_checkpoint, tokenizer, kind):
    spec = CheckpointSpec("mine", str(asentmax_checkpoint), kind)
    with pytest.raises(CheckpointError, match="mine has nape positions"):
        load_model(spec, tokenizer, train_length=24, max_length=96)


def test_learned_positions_have_an_end(tmp_path, tokenizer):
    config = GPT2Config(vocab_size=400, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = CheckpointSpec("gpt", str(tmp_path))
    assert load_model(spec, tokenizer, train_length=32, max_length=32)
    with pytest.raises(CheckpointError, match="gpt has learned positions up to 32, so it cannot read 33 tokens"):
        load_model(spec, tokenizer, train_length=32, max_length=33)


def test_specs_have_names_and_one_scaling_each():
    specs = parse_specs(["a=/x/y", "/x/y"], ["none", "yarn"])
    assert [(spec.label, spec.path) for spec in specs] == [("a", "/x/y"), ("y+yarn", "/x/y")]
    for models, scalings, message in (
        (["a", "x/a"], ["none"], "'a' occurs twice"),
        (["a", "b", "c"], ["none", "yarn"], "rope_scaling has 2 values"),
        (["a"], ["linear"], "rope_scaling is 'linear'"),
        ([], ["none"], "at least one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            parse_specs(models, scalings)


def test_fingerprints_tell_tokenizers_apart(tokenizer, softmax_checkpoint):
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(softmax_checkpoint)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    again.add_tokens(["needle"])
    assert tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer)
