"""The paper's claims hold in the small experiments that measure them, and so do the committed numbers."""

import json
import math
from pathlib import Path

import pytest
import torch

from hf_sparse_attention.analysis import attention_map
from hf_sparse_attention.analysis.experiments import (
    CURVES,
    PRESETS,
    copies,
    curve_weights,
    dispersion,
    early_token,
    irrelevant_tokens,
    marker_model,
    run_experiments,
)

COMMITTED = Path(__file__).parents[2] / "model_cards" / "results" / "experiments.json"


def check_dispersion(result):
    lengths = result["lengths"]
    for kind in ("uniform", "needles"):
        softmax = result[kind]["softmax"]
        assert softmax["support"] == lengths
        # Bounded logits: H is at least log n - 4, so H / log n goes to 1.
        assert all(h >= 1 - 4 / math.log(n) for h, n in zip(softmax["entropy"], lengths))
        assert softmax["entropy"][-1] > 0.94
        for name in ("entmax", "asentmax", "sparsemax"):
            assert result[kind][name]["entropy"][-1] < 0.65
    for name, alpha in (("entmax", 1.5), ("sparsemax", 2.0)):
        support = result["uniform"][name]["support"]
        growth = math.log(support[-1] / support[0]) / math.log(lengths[-1] / lengths[0])
        assert growth == pytest.approx(1 / alpha, abs=0.06)
    for name in ("entmax", "asentmax", "sparsemax"):
        assert result["needles"][name]["support"] == [4.0] * len(lengths)
        expected = [math.log(4) / math.log(n) for n in lengths]
        assert result["needles"][name]["entropy"] == pytest.approx(expected, rel=1e-6)


def check_irrelevant_tokens(result):
    # Only zeros are added, but in another order of summation the last bits may differ.
    last_bits = {"float32": 3e-6, "bfloat16": 0.02}
    for dtype, found in (item for backend in result["entmax"].values() for item in backend.items()):
        assert found["gradient"]["difference"] == 0.0
        for change in ("changed", "appended", "prepended"):
            assert found[change]["bit_equal"] == (found[change]["difference"] == 0.0)
            assert found[change]["difference"] < last_bits[dtype]
        assert found["length_scale"]["difference"] > 0.01
    for found in result["entmax"]["reference"].values():
        assert found["changed"]["bit_equal"]
    for found in (dtypes for backend in result["softmax"].values() for dtypes in backend.values()):
        assert all(found[change]["difference"] > 0.05 for change in found)


def check_early_token(result):
    lengths = result["lengths"]
    apart, alike = result["distance"]["4"], result["distance"]["0"]
    assert list(apart) == list(PRESETS)
    for preset in ("entmax", "asentmax"):
        assert apart[preset][-1] > 0.8 * apart[preset][0] > 0.5
    assert apart["softmax"][-1] < 3 * apart["softmax"][0] * (lengths[0] / lengths[-1]) ** 0.5
    for preset in PRESETS:
        assert alike[preset][-1] < 0.3 * alike[preset][0]


def check_copies(result):
    curves, kinds = result["curves"], result["kinds"]
    assert curves["softmax"]["kept"] == [kinds] * len(result["numbers"])
    for name in ("softmax", "entmax, blunter"):
        assert max(curves[name]["moved"]) < 1e-6, name
    for name in ("entmax", "asentmax", "sparsemax"):
        kept = curves[name]["kept"]
        assert kept[0] < kinds
        assert kept == sorted(kept, reverse=True)
        assert kept[-1] < 0.6 * kept[0]


def test_more_copies_leave_fewer_kinds():
    check_copies(copies([1, 3, 200], kinds=20, draws=5))


def test_dispersion():
    check_dispersion(dispersion([16, 300, 20000], draws=6))


def test_weights_of_the_curves():
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    for name, (alpha, scale) in CURVES.items():
        t = 1.0 if scale is None else scale(3)
        weights = curve_weights(logits, alpha, t)
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-6), name
        if alpha == 1.0:
            torch.testing.assert_close(weights, (t * logits).softmax(-1))
    assert CURVES["asentmax"][1](7) == pytest.approx(1 + math.log(8))


def test_tokens_outside_the_support_change_nothing():
    check_irrelevant_tokens(irrelevant_tokens(keys=131, added=77))


def test_an_early_token_keeps_sequences_apart():
    check_early_token(early_token([16, 128, 512], contexts=2))


def test_markers_are_scored_higher():
    """The gap is what the two differing tokens have over the others in the first layer, in units of scores."""
    tokens = [5, 62, 9, 63, 17, 33, 2]
    gap, plain = (attention_map(marker_model("softmax", gap), tokens, 0, 0)[0][-1].log() for gap in (4.0, 0.0))
    moved = gap - plain
    difference = moved[[1, 3]] - moved[[0, 2, 4, 5, 6]].mean()
    assert difference.tolist() == pytest.approx([4.0, 4.0], abs=0.6)


def test_committed_numbers_show_the_claims():
    content = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert content["run"]["versions"]["hf_sparse_attention"]
    check_dispersion(content["dispersion"])
    check_irrelevant_tokens(content["irrelevant_tokens"])
    check_early_token(content["early_token"])
    check_copies(content["copies"])
    for file in COMMITTED.parent.glob("experiments.*"):
        assert file.stat().st_size < 150_000


def test_all_depend_on_the_seed_alone():
    content = run_experiments([8, 9], [4, 5], seed=3)
    assert dispersion([8, 9], seed=3) == content["dispersion"] != dispersion([8, 9], seed=4)
    assert early_token([4, 5], seed=3) == content["early_token"] != early_token([4, 5], seed=4)
    first, again, other = (irrelevant_tokens(keys=33, added=5, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
