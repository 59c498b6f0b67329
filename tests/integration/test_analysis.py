"""Statistics and pictures of attention, against what the models and the operator compute."""

import math
import weakref

import numpy
import pytest
import torch
from families import FAMILIES, alone, assert_same, prompts, tiny_config, tiny_model
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_sparse_attention import attention as attention_module
from hf_sparse_attention import convert
from hf_sparse_attention.analysis import AttentionStatistics, analyze, attention_map, by_head_type, observe_attention
from hf_sparse_attention.analysis.plots import plot_against_length, plot_attention_maps, plot_length_scales

SCALED = {
    "asentmax-model": {"preset": "asentmax"},
    "asentmax-nape": {"preset": "asentmax", "position": "nape"},
    "asentmax-alibi": {"preset": "asentmax", "position": "alibi"},
    "ssmax-nape": {"preset": "ssmax", "position": "nape"},
    "entmax-nope": {"preset": "entmax", "position": "nope"},
}


def hooks(model):
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]


def close(actual, expected):
    numpy.testing.assert_allclose(numpy.array(actual), numpy.array(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["asentmax", "softmax"])
def test_statistics_equal_direct_computation(preset):
    model = tiny_model(preset=preset, position="nape")
    documents = prompts(21, 7)
    result = analyze(model, documents).to_dict()
    assert result["ranges"] == [
        {"first": first, "last": last} for first, last in ((2, 2), (3, 4), (5, 8), (9, 16), (17, 32))
    ]
    measured = {"support": [], "entropy": [], "zeros": []}
    for layer in range(2):
        for name in measured:
            measured[name].append([])
        for head in range(6):
            rows = []
            for tokens in documents:
                with torch.no_grad():
                    weights = model(tokens[None], output_attentions=True).attentions[layer][0, head]
                for query in range(1, len(tokens)):
                    row = weights[query, : query + 1].tolist()
                    positive = [p for p in row if p > 0]
                    entropy = -sum(p * math.log(p) for p in positive) / math.log(len(row))
                    rows.append((len(row), len(positive), entropy, row.count(0.0) / len(row)))
            for place, name in enumerate(measured, start=1):
                means = []
                for bounds in result["ranges"]:
                    chosen = [row[place] for row in rows if bounds["first"] <= row[0] <= bounds["last"]]
                    means.append(sum(chosen) / len(chosen))
                measured[name][layer].append(means)
    for name, expected in measured.items():
        close(result[name], expected)
    close(result["queries"], [[2, 4, 7, 8, 5]] * 2)
    close(result["keys"], [[2.0, 3.5, (5 + 6 + 7 + 8 + 5 + 6 + 7) / 7, 12.5, 19.0]] * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_supports_all_visible_keys(family):
    model = tiny_model(family, "softmax")
    result = analyze(model, prompts(19)).to_dict()
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    for layer, kind in enumerate(layer_types):
        windowed = kind == "sliding_attention" or family == "mistral"
        expected = [2.0, 3.5, 5.0] if windowed else [2.0, 3.5, 6.5, 12.5, 18.0]
        assert result["keys"][layer][: len(expected)] == pytest.approx(expected)
        for head in range(6):
            support, zeros = result["support"][layer][head], result["zeros"][layer][head]
            assert support[: len(expected)] == pytest.approx(expected)
            assert zeros[: len(expected)] == [0.0] * len(expected)
            assert all(map(math.isnan, support[len(expected) :]))


def test_top_k_supports_k_keys():
    model = tiny_model(preset="topk")
    convert(model, "topk", top_k=3)
    result = analyze(model, prompts(31)).to_dict()
    assert result["support"][1][4] == [2.0, 3.0, 3.0, 3.0, 3.0]
    assert result["zeros"][0][0][3] == pytest.approx(sum(1 - 3 / n for n in range(9, 17)) / 8)


@pytest.mark.parametrize("case", SCALED.values(), ids=SCALED)
def test_scale_is_what_the_operator_gets(monkeypatch, case):
    model = tiny_model(**case)
    given, seen = [], []
    operator = attention_module.sparse_attention

    def spy(query, key, value, **arguments):
        scale = arguments["query_scale"]
        given.append(torch.ones(query.shape[:3]) if scale is None else scale)
        return operator(query, key, value, **arguments)

    monkeypatch.setattr(attention_module, "sparse_attention", spy)
    (tokens,) = prompts(13)
    with observe_attention(model, seen.append):
        alone(model, tokens)
    assert [attention.layer for attention in seen] == [0, 1]
    for attention, scale in zip(seen, given, strict=True):
        torch.testing.assert_close(attention.scale, scale)
        if attention.beta is not None:
            n = torch.arange(1, 14)
            delta = 0.0 if case["preset"] == "ssmax" else 1.0
            formula = delta + attention.beta * torch.log(n + 1.0) ** attention.gamma
            scaled = attention.scaled.nonzero()[:, 0]
            torch.testing.assert_close(attention.scale[:, scaled], formula.expand(1, 6, 13)[:, scaled])

    result = analyze(model, [tokens, *prompts(5)]).to_dict()
    applies = {"asentmax-model": 6, "asentmax-nape": 3, "asentmax-alibi": 6, "ssmax-nape": 3, "entmax-nope": 0}
    number = applies["-".join((case["preset"], case.get("position", "model")))]
    for parameter in ("beta", "gamma"):
        unused = [math.isnan(value) for value in result[parameter][0]]
        assert unused == [True] * (6 - number) + [False] * number
    if case["preset"] == "ssmax":
        factor = model.model.layers[1].self_attn.length_scale.factor.weight[3:, 0].tolist()
        assert result["beta"][1][3:] == pytest.approx(factor)
        assert result["gamma"][1][3:] == [1.0, 1.0, 1.0]


def test_first_layers_have_slopes_on_all_heads():
    model = tiny_model(position={"position_encoding": "nape", "alibi_layers": 1})
    seen = []
    with observe_attention(model, seen.append):
        alone(model, prompts(13)[0])
    assert [(attention.slopes > 0).tolist() for attention in seen] == [[True] * 6, [True] * 3 + [False] * 3]
    assert [attention.scaled.tolist() for attention in seen] == [[False] * 6, [False] * 3 + [True] * 3]


def test_parameters_are_means_over_all_tokens():
    model, documents = tiny_model(), prompts(11, 6)
    inputs = []
    handle = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    result = analyze(model, documents).to_dict()
    handle.remove()
    scale = model.model.layers[1].self_attn.length_scale
    beta, gamma = scale(torch.cat(inputs, dim=1))
    close(result["beta"][1], beta.mean((0, 2)).tolist())
    close(result["gamma"][1], gamma.mean((0, 2)).tolist())


def test_nothing_is_left_behind():
    model = tiny_model(position="nape").train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    before = hooks(model)
    analyze(model, prompts(9))
    assert hooks(model) == before
    assert [module.training for module in model.modules()] == modes

    def fail(attention):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), observe_attention(model, fail):
        alone(model, prompts(4)[0])
    assert hooks(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_observed_models_compute_the_same():
    model, (tokens,) = tiny_model(position="nape"), prompts(12)
    expected = alone(model, tokens)
    with observe_attention(model, lambda attention: None):
        assert_same(alone(model, tokens), expected, "observed")


def test_weights_of_one_layer_in_memory():
    model = tiny_model(num_hidden_layers=4)
    alive, logits = [], []

    def receive(attention):
        assert attention.weights.shape == (1, 6, 17, 17)
        alive.append(weakref.ref(attention.weights))

    def all_gone(*_):
        assert alive
        assert not any(ref() is not None for ref in alive)

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(all_gone)
    with observe_attention(model, receive):
        alone(model, prompts(17)[0])
    assert len(alive) == 4

    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output.shape))
    analyze(model, prompts(17))
    assert logits == [(1, 1, 61)]


def test_attention_map():
    model, (tokens,) = tiny_model("gemma2", "entmax"), prompts(14)
    with torch.no_grad():
        attentions = model(tokens[None], output_attentions=True).attentions
    for layer, window in ((0, 5), (-1, 14)):
        weights, visible = attention_map(model, tokens, layer, -2)
        torch.testing.assert_close(weights, attentions[layer][0, 4].cpu())
        index = torch.arange(14, device="cpu")
        distance = index[:, None] - index
        assert torch.equal(visible, (distance >= 0) & (distance < window))
        assert not weights[~visible].any()
        assert (weights[visible] == 0).any()


def test_adapters_are_seen_through():
    model, documents = tiny_model(position="nape"), prompts(15)
    expected = analyze(model, documents).to_dict()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["length_scale"]))
    assert str(analyze(wrapped, documents).to_dict()) == str(expected)
    torch.nn.init.normal_(wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    assert analyze(wrapped, documents).to_dict()["entropy"] != expected["entropy"]


def test_errors_name_what_is_wrong():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"layer is 2; allowed: -2 to 1"):
        attention_map(model, [3, 4], 2, 0)
    with pytest.raises(ValueError, match=r"head is -7; allowed: -6 to 5"):
        attention_map(model, [3, 4], 0, -7)
    for tokens in ([], [[3, 4]]):
        with pytest.raises(ValueError, match="tokens have shape"):
            analyze(model, [tokens])
    with pytest.raises(ValueError, match="no token with two visible keys"):
        analyze(model, [[5]]).to_dict()
    with pytest.raises(ValueError, match="no token with two visible keys"):
        AttentionStatistics().to_dict()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"'sdpa', which gives no weights; call hf_sparse_attention.convert"):
        analyze(model, [[3, 4]])
    plain = AutoModelForCausalLM.from_config(tiny_config())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no attention layer .*convert\(model, 'softmax'\)"):
        analyze(plain, [[3, 4]])
    convert(plain, "softmax")
    assert analyze(plain, [[3, 4]]).to_dict()["support"] == [[[2.0]] * 6] * 2


def test_types_of_heads():
    result = analyze(tiny_model(position="nape"), prompts(33)).to_dict()
    summary = by_head_type(result, "entropy")
    assert list(summary) == ["ALiBi", "no ALiBi"]
    by_head = numpy.array(result["entropy"])
    for heads, kind in ((slice(0, 3), "ALiBi"), (slice(3, 6), "no ALiBi")):
        chosen = by_head[:, heads].reshape(6, -1)
        for name, function in (("median", numpy.median), ("low", numpy.min), ("high", numpy.max)):
            close(summary[kind][name], function(chosen, axis=0))
    assert list(by_head_type(analyze(tiny_model(), prompts(5)).to_dict(), "support")) == ["no ALiBi"]


def test_pictures(tmp_path):
    results, maps = {}, {}
    (tokens,) = prompts(40)
    for preset in ("softmax", "asentmax"):
        model = tiny_model("gemma3", preset, "nape")
        results[preset] = analyze(model, [tokens]).to_dict()
        maps[preset] = attention_map(model, tokens, -1, -1)
    plot_against_length(tmp_path / "length.png", results, train_length=16)
    assert plot_length_scales(tmp_path / "scale.png", results)
    assert not plot_length_scales(tmp_path / "none.png", {"softmax": results["softmax"]})
    assert not (tmp_path / "none.png").exists()
    for name in ("length", "scale"):
        assert imread(tmp_path / f"{name}.png").std() > 0.05

    # Exact zeros have a colour that nothing else in the map has, but for its legend.
    pixels = {}
    for preset, (weights, visible) in maps.items():
        plot_attention_maps(tmp_path / f"{preset}.png", {preset: (weights, visible)})
        image = imread(tmp_path / f"{preset}.png")[..., :3]
        pixels[preset] = (numpy.abs(image - to_rgb("mistyrose")).max(-1) < 0.01).sum()
    zeros = {preset: int((visible & (weights == 0)).sum()) for preset, (weights, visible) in maps.items()}
    assert zeros["softmax"] == 0
    assert zeros["asentmax"] > 0.3 * 40 * 41 / 2
    assert pixels["asentmax"] > 5 * pixels["softmax"]
