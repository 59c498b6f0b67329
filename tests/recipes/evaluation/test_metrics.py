"""The metrics of the package, by import and through ``evaluate.load``."""

import math

import evaluate
import pytest

from hf_sparse_attention.metrics import metric_path
from hf_sparse_attention.metrics.needle_recall.needle_recall import NeedleRecall
from hf_sparse_attention.metrics.perplexity_by_length.perplexity_by_length import PerplexityByLength


@pytest.fixture(params=["import", "load"])
def recall(request):
    return NeedleRecall() if request.param == "import" else evaluate.load(metric_path("needle_recall"))


def test_recall_is_the_share_of_answers_in_the_text(recall):
    scores = recall.compute(
        predictions=["It is 4821, of course", "482 1", "AB12 and 77"], references=[["4821"], ["4821"], ["ab12", "99"]]
    )
    assert scores == {"needle_recall": pytest.approx(0.5), "per_sample": [1.0, 0.0, 0.5]}


@pytest.mark.parametrize(("text", "found"), [(" 4821.", 1.0), ("4821", 1.0), ("4821 and", 0.0), ("14821", 0.0)])
def test_exact_recall_wants_the_answer_alone(text, found):
    assert NeedleRecall().compute(predictions=[text], references=[["4821"]], exact=True)["needle_recall"] == found


def test_recall_refuses_samples_without_an_answer():
    with pytest.raises(ValueError, match="references"):
        NeedleRecall().compute(predictions=["a"], references=[[]])


@pytest.mark.parametrize("load", [False, True], ids=["import", "load"])
def test_perplexity_weighs_tokens_not_windows(load):
    metric = evaluate.load(metric_path("perplexity_by_length")) if load else PerplexityByLength()
    scores = metric.compute(nll=[3.0, 1.0, 4.0], tokens=[1, 3, 2], lengths=[8, 8, 16], documents=[0, 1, 0])
    assert list(scores) == ["8", "16"]
    assert scores["8"]["loss"] == pytest.approx(1.0)
    assert scores["8"]["perplexity"] == pytest.approx(math.e)
    assert (scores["8"]["tokens"], scores["8"]["documents"]) == (4, 2)
    assert scores["16"]["perplexity"] == pytest.approx(math.exp(2.0))


def test_interval_resamples_documents():
    settings = {"nll": [0.0, 0.0, 2.0, 2.0], "tokens": [1] * 4, "lengths": [8] * 4, "seed": 3}
    two = PerplexityByLength().compute(documents=[0, 0, 1, 1], **settings)["8"]
    four = PerplexityByLength().compute(documents=[0, 1, 2, 3], **settings)["8"]
    # Two documents of constant loss: a resample is 0, 1 or 2 nats, so the 95 % interval spans both ends.
    assert (two["low"], two["high"]) == (pytest.approx(1.0), pytest.approx(math.exp(2.0)))
    narrow = PerplexityByLength().compute(documents=[0, 1, 2, 3], confidence=0.2, **settings)["8"]
    assert four["low"] < narrow["low"] <= four["perplexity"] <= narrow["high"] < four["high"]
    assert four == PerplexityByLength().compute(documents=[0, 1, 2, 3], **settings)["8"]


def test_perplexity_of_a_diverged_model_is_infinite():
    score = PerplexityByLength().compute(nll=[1000.0], tokens=[1], lengths=[8], documents=[0])["8"]
    assert score["perplexity"] == math.inf


def test_unknown_metric_lists_the_known_ones():
    with pytest.raises(ValueError, match="needle_recall, perplexity_by_length"):
        metric_path("needles")
