"""Small experiments on what the paper claims of alpha-entmax attention (arXiv 2506.16640, section 3).

- *Dispersion*: with bounded logits the normalised entropy of softmax goes to 1 as tokens are added; that of entmax
  does not.
- *Irrelevant tokens*: a token outside the support changes nothing, whatever it holds and however many there are.
- *Early token*: two sequences that differ in one early token stay apart at their last token as they grow, provided
  that attention singles that token out; under softmax they come together.
- *Copies*: where keys repeat, as in the first layer of a model without positions, more copies of all of them leave
  softmax's shares as they are and take the weaker kinds from entmax.

All run on random numbers and untrained models, from a seed, through the package's own operator and presets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, set_seed

from ..ops import sparse_attention

# Exponent alpha and length scale t(n) of the curves; ssmax with b = 1, asentmax with delta = beta = gamma = 1.
CURVES: dict[str, tuple[float, Any]] = {
    "softmax": (1.0, None),
    "ssmax": (1.0, math.log1p),
    "entmax": (1.5, None),
    "asentmax": (1.5, lambda n: 1.0 + math.log1p(n)),
    "sparsemax": (2.0, None),
}
_BOUND = 4.0
_NEEDLES = 4
PRESETS = ("softmax", "ssmax", "entmax", "asentmax")
_FEATURES = {"marker": 0, "constant": 1}
_VOCAB, _HIDDEN, _HEADS = 64, 32, 2


def run_experiments(
    entropy_lengths: Sequence[int], early_token_lengths: Sequence[int], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """All four, as the JSON that the recipe writes."""
    return {
        "dispersion": dispersion(entropy_lengths, seed=seed),
        "irrelevant_tokens": irrelevant_tokens(seed=seed),
        "early_token": early_token(early_token_lengths, seed=seed),
        "copies": copies(seed=seed),
    }


def dispersion(lengths: Sequence[int], draws: int = 32, seed: int = 0) -> dict[str, Any]:
    """Normalised entropy H / log n and support size of the same logits under every curve of ``CURVES``.

    Two kinds of logits in [0, 4]: ``uniform``, independent; and ``needles``, where four logits are 4 and all others
    uniform in [0, 2]. With uniform logits the support of entmax grows as n ** (1 / alpha), so that H / log n goes to
    1 / alpha. A gap of 2 is 1 / (alpha - 1) for alpha = 1.5: entmax keeps the needles alone, and H stays log 4.

    Args:
        lengths: numbers n of logits, from 8 on.
        draws: how many samples of logits; the means are over them.
    """
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {"lengths": list(lengths), "draws": draws, "bound": _BOUND, "needles": _NEEDLES}
    for kind in ("uniform", "needles"):
        result[kind] = {name: {"entropy": [], "support": []} for name in CURVES}
    for n in lengths:
        uniform = torch.rand(draws, n, generator=generator, dtype=torch.float64) * _BOUND
        needles = uniform / 2
        needles[:, :_NEEDLES] = _BOUND
        for kind, logits in (("uniform", uniform), ("needles", needles)):
            for name, (alpha, scale) in CURVES.items():
                weights = curve_weights(logits, alpha, 1.0 if scale is None else scale(n))
                entropy = torch.special.entr(weights).sum(-1) / math.log(n)
                result[kind][name]["entropy"].append(entropy.mean().item())
                result[kind][name]["support"].append((weights > 0).sum(-1).double().mean().item())
    return result


def curve_weights(logits: Tensor, alpha: float, scale: float) -> Tensor:
    """Attention weights (draws, n) of one query per row whose scores are ``logits``."""
    key = logits[:, None, :, None]
    query = torch.ones_like(key[:, :, :1])
    return sparse_attention(query, key, key, alpha=alpha, scaling=scale, return_weights=True)[1][:, 0, 0]


def copies(
    numbers: Sequence[int] = (1, 4, 16, 64, 256), kinds: int = 32, draws: int = 32, seed: int = 0
) -> dict[str, Any]:
    """How many kinds of tokens keep a weight when there are more copies of each.

    Logits are uniform in [0, 4], one for each kind, the same for all of its copies. The weights of one kind, summed
    over m copies, are those without copies if the scale t is multiplied by m ** (1 - alpha) (the curve
    ``entmax, blunter``): the threshold falls by the same factor, since the weights are powers 1 / (alpha - 1).

    Returns:
        For each curve, by number of copies, the mean number of kinds with a weight, ``kept``, and the mean share of
        the weight that is on other kinds than without copies, ``moved``.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(draws, kinds, generator=generator, dtype=torch.float64) * _BOUND
    curves = {**CURVES, "entmax, blunter": (1.5, lambda n: (n / kinds) ** -0.5)}
    result: dict[str, Any] = {"numbers": list(numbers), "kinds": kinds, "draws": draws, "curves": {}}
    for name, (alpha, scale) in curves.items():
        shares = []
        for number in numbers:
            t = 1.0 if scale is None else scale(kinds * number)
            weights = curve_weights(logits.repeat(1, number), alpha, t)
            shares.append(weights.view(draws, number, kinds).sum(1))
        result["curves"][name] = {
            "kept": [(share > 0).sum(-1).double().mean().item() for share in shares],
            "moved": [(share - shares[0]).abs().sum(-1).mean().item() / 2 for share in shares],
        }
    return result


def irrelevant_tokens(
    keys: int = 1000, added: int = 1500, seed: int = 0, backends: Sequence[str] = ("reference", "chunked")
) -> dict[str, Any]:
    """How far the output moves when tokens outside the support are changed or added, per backend and dtype.

    One query in each of 4 x 8 heads of dimension 64, gaussian keys and values.

    - ``changed``: each key outside the support gets a score at most as high, and a value 100 times as large;
    - ``appended``, ``prepended``: ``added`` more tokens, with scores below the threshold and large values;
    - ``gradient``: the largest gradient of a key or value outside the support;
    - ``length_scale``: tokens are appended under t = 1 + log(n + 1), which depends on how many there are.

    Returns:
        For entmax and, with the same tokens, for softmax: per backend, dtype and change the largest absolute
        ``difference``, and whether the outputs are ``bit_equal``.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(length: int) -> Tensor:
        return torch.randn(4, 8, length, 64, generator=generator, dtype=torch.float64)

    query, key, value = 2 * gaussian(1), gaussian(keys), gaussian(keys)
    more_keys, more_values = gaussian(added), 100 * gaussian(added)
    result: dict[str, Any] = {"keys": keys, "added": added}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, more_k, more_v = (t.to(dtype) for t in (query, key, value, more_keys, more_values))
        outside = sparse_attention(q, k, v, return_weights=True)[1][:, :, 0, :, None] == 0
        # Moving a key against the query lowers its score.
        lower = -q / q.float().square().sum(-1, keepdim=True).to(dtype)
        steps = torch.rand(outside.shape, generator=generator).to(dtype) * 4
        changed_keys = torch.where(outside, k + steps * lower, k)
        changed_values = torch.where(outside, 100 * v, v)
        scores = (more_k * q).float().sum(-1, keepdim=True)
        more_k = more_k + ((scores + 1).to(dtype) * lower)
        variants = {
            "changed": (changed_keys, changed_values),
            "appended": (torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)),
            "prepended": (torch.cat([more_k, k], 2), torch.cat([more_v, v], 2)),
        }
        for name, alpha in (("entmax", 1.5), ("softmax", 1.0)):
            for backend in backends:
                before = sparse_attention(q, k, v, alpha=alpha, impl=backend)
                found = {
                    change: _compare(sparse_attention(q, *tokens, alpha=alpha, impl=backend), before)
                    for change, tokens in variants.items()
                }
                scaled = [
                    sparse_attention(q, *tokens, alpha=alpha, impl=backend, query_scale=_scale(q, tokens[0].shape[2]))
                    for tokens in ((k, v), variants["appended"])
                ]
                found["length_scale"] = _compare(*scaled)
                found["gradient"] = _gradient_outside(q, k, v, outside, alpha, backend)
                result.setdefault(name, {}).setdefault(backend, {})[str(dtype).removeprefix("torch.")] = found
    return result


def _scale(query: Tensor, keys: int) -> Tensor:
    return torch.full(query.shape[:3], 1.0 + math.log1p(keys), dtype=torch.float32)


def _compare(after: Tensor, before: Tensor) -> dict[str, Any]:
    return {"bit_equal": torch.equal(after, before), "difference": (after - before).abs().max().item()}


def _gradient_outside(q: Tensor, k: Tensor, v: Tensor, outside: Tensor, alpha: float, backend: str) -> dict[str, Any]:
    k, v = k.clone().requires_grad_(), v.clone().requires_grad_()
    sparse_attention(q, k, v, alpha=alpha, impl=backend).square().sum().backward()
    largest = max((grad * outside).abs().max().item() for grad in (k.grad, v.grad))
    return {"bit_equal": largest == 0.0, "difference": largest}


def early_token(
    lengths: Sequence[int], gaps: Sequence[float] = (4.0, 0.0), contexts: int = 4, seed: int = 0
) -> dict[str, Any]:
    """Distance at the last token between two sequences that differ in their second token, by preset and length.

    Two-layer Llamas without position information, with the same random weights for every preset. Each query scores
    the two tokens that differ higher than all others by about ``gap``; with gap 0 nothing singles them out.

    Returns:
        ``distance[gap][preset]``: per length, the distance of the last hidden states relative to their norm, mean over
        ``contexts`` random contexts.
    """
    result: dict[str, Any] = {"lengths": list(lengths), "contexts": contexts, "distance": {}}
    for gap in gaps:
        curves = result["distance"][f"{gap:g}"] = {}
        for preset in PRESETS:
            model = marker_model(preset, gap, seed)
            curves[preset] = [_distance(model, length, contexts, seed) for length in lengths]
    return result


def marker_model(preset: str, gap: float, seed: int = 0) -> LlamaModel:
    """A random Llama whose queries score the last two tokens of its vocabulary higher than the others by ``gap``."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        initializer_range=0.15,
        attn_implementation=preset,
        sparse_attention={"position_encoding": "nope"},
    )
    model = LlamaModel(config).eval()
    marker, constant = _FEATURES["marker"], _FEATURES["constant"]
    with torch.no_grad():
        embedding = model.embed_tokens.weight
        embedding.normal_()
        embedding[:, marker], embedding[:, constant] = 0.0, 1.0
        embedding[-2:, marker] = math.sqrt(_HIDDEN) / 2
        # What a normalised marker token has of its feature, times that of the constant one.
        normalised = embedding[-2:] / embedding[-2:].square().mean(-1, keepdim=True).sqrt()
        strength = normalised[:, marker].mean().item()
        head_dim = _HIDDEN // _HEADS
        for layer in model.layers:
            attention = layer.self_attn
            for projection, feature in ((attention.q_proj, constant), (attention.k_proj, marker)):
                rows = projection.weight.view(_HEADS, head_dim, _HIDDEN)
                rows[:, 0] = 0.0
                rows[:, 0, feature] = math.sqrt(gap * math.sqrt(head_dim) / strength)
            # The two features stay as they are through the layers.
            for projection in (attention.o_proj, layer.mlp.down_proj):
                projection.weight[[marker, constant]] = 0.0
    return model


@torch.no_grad()
def _distance(model: LlamaModel, length: int, contexts: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(contexts):
        ids = torch.randint(_VOCAB - 2, (length,), generator=generator).repeat(2, 1)
        ids[:, 1] = torch.tensor([_VOCAB - 2, _VOCAB - 1])
        ids[:, -1] = 0
        first, second = model(ids, use_cache=False).last_hidden_state[:, -1]
        distances.append(((first - second).norm() / first.norm()).item())
    return sum(distances) / contexts
