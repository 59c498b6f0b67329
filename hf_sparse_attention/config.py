"""The settings of sparse attention, stored as the nested field ``config.sparse_attention`` of a model's config."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What makes a preset that preset; every other field is free to vary within it.
PRESETS: dict[str, dict[str, Any]] = {
    "asentmax": {"alpha": 1.5, "length_scaling": "adaptive", "top_k": None},
    "entmax": {"alpha": 1.5, "length_scaling": "none", "top_k": None},
    "ssmax": {"alpha": 1.0, "length_scaling": "log", "top_k": None},
    "softmax": {"alpha": 1.0, "length_scaling": "none", "top_k": None},
    "topk": {"alpha": 1.0, "length_scaling": "none", "top_k": 64},
}
LENGTH_SCALINGS = ("adaptive", "learned", "log", "none")
POSITION_ENCODINGS = ("model", "nape", "alibi", "nope")
ALIBI_SLOPES = ("linear", "geometric")
BACKENDS = ("auto", "triton", "chunked", "reference")


def _option(help: str, default: Any) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SparseAttentionConfig:
    """Settings of one model's attention (ASEntmax, arXiv 2506.16640). All values are JSON scalars.

    The score of query i and key j, over the ``n_i`` keys that query sees, is
    ``q_i . k_j * scaling * t_i - slope * (i - j)`` with ``t_i = delta + beta_i * log(n_i + 1) ** gamma_i``.

    Raises:
        ValueError: a field is unknown or out of range; the message names the field, the value and what is allowed.
    """

    preset: str = _option("name used as attn_implementation; gives alpha, length_scaling and top_k", "asentmax")
    alpha: float | None = _option("entmax exponent in [1, 2]: 1 is softmax, 2 sparsemax; default by preset", None)
    length_scaling: str | None = _option(
        "adaptive: beta and gamma from the hidden states; learned: one beta and gamma per head; "
        "log: one factor b per head times log(n + 1); none; default by preset",
        None,
    )
    top_k: int | None = _option("softmax over the k largest scores; only for the preset topk (default 64)", None)
    delta: float = _option("constant part of the scale t", 1.0)
    gamma_range: float = _option("gamma lies in (-gamma_range, gamma_range)", 2.0)
    positive_gamma: bool = _option("gamma lies in (0, gamma_range): t never falls as the number of keys grows", False)
    projection_bias: bool = _option("whether the adaptive beta and gamma projections have a bias", True)
    beta_bias_init: float = _option("initial bias of the beta projection, before softplus; -4 starts near t = 1", -4.0)
    position_encoding: str = _option(
        "model: what the architecture has; nape: no RoPE, ALiBi on the first heads, nothing on the others; "
        "alibi: ALiBi on all heads; nope: no position information",
        "model",
    )
    alibi_heads: int | None = _option("how many heads, from the first, have ALiBi under nape; default: half", None)
    alibi_layers: int = _option("how many layers, from the first, have ALiBi on all heads under nape", 0)
    alibi_slopes: str = _option("linear: 1, 1/2, 1/3, ...; geometric: 2^(-8 i / heads)", "linear")
    scale_alibi_heads: bool | None = _option(
        "apply the length scale to ALiBi heads too; default: false under nape, true under alibi", None
    )
    backend: str = _option("auto, triton, chunked or reference", "auto")

    def __post_init__(self) -> None:
        _check_choice("preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.scale_alibi_heads is None:
            self.scale_alibi_heads = self.position_encoding == "alibi"
        self._check()

    def _check(self) -> None:
        self.alpha = _check_number("alpha", self.alpha, 1.0, 2.0)
        _check_choice("length_scaling", self.length_scaling, LENGTH_SCALINGS)
        self.delta = _check_number("delta", self.delta, 0.0, math.inf)
        self.gamma_range = _check_number("gamma_range", self.gamma_range, 0.0, 8.0)
        self.beta_bias_init = _check_number("beta_bias_init", self.beta_bias_init, -100.0, 100.0)
        _check_choice("position_encoding", self.position_encoding, POSITION_ENCODINGS)
        _check_choice("alibi_slopes", self.alibi_slopes, ALIBI_SLOPES)
        _check_choice("backend", self.backend, BACKENDS)
        for name in ("positive_gamma", "projection_bias", "scale_alibi_heads"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "true or false")
        for name in ("top_k", "alibi_heads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise _error(name, value, "an integer of at least 1, or null")
        if self.preset in ("softmax", "ssmax", "topk") and self.alpha != 1.0:
            raise _error("alpha", self.alpha, f"1 for the preset {self.preset}; asentmax and entmax take others")
        if self.preset == "topk" and self.top_k is None:
            raise _error("top_k", self.top_k, "an integer of at least 1 for the preset topk")
        if self.preset != "topk" and self.top_k is not None:
            raise _error("top_k", self.top_k, "null for every preset but topk")
        if isinstance(self.alibi_layers, bool) or not isinstance(self.alibi_layers, int) or self.alibi_layers < 0:
            raise _error("alibi_layers", self.alibi_layers, "an integer of at least 0")
        if self.alibi_heads is not None and self.position_encoding != "nape":
            raise _error("alibi_heads", self.alibi_heads, "null unless position_encoding is nape")
        if self.alibi_layers and self.position_encoding != "nape":
            raise _error("alibi_layers", self.alibi_layers, "0 unless position_encoding is nape")

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any] | SparseAttentionConfig | None = None, **overrides: Any
    ) -> SparseAttentionConfig:
        """Build from a mapping, with ``overrides`` on top.

        Raises:
            ValueError: a field does not exist or is out of range; the message names it.
            TypeError: ``values`` is not a mapping.
        """
        if isinstance(values, SparseAttentionConfig):
            values = values.to_dict()
        merged = merge_settings(values, overrides)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in merged:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"sparse_attention has no field {name!r} (value {merged[name]!r}).{hint} "
                    f"Fields: {', '.join(known)}."
                )
        return cls(**merged)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON scalars."""
        return dataclasses.asdict(self)

    def with_preset(self, preset: str) -> SparseAttentionConfig:
        """The same settings under another preset: alpha, length_scaling and top_k become that preset's."""
        _check_choice("preset", preset, tuple(PRESETS))
        return dataclasses.replace(self, preset=preset, **PRESETS[preset])

    def check_sizes(self, num_heads: int, num_layers: int) -> None:
        """Raise ValueError for more ALiBi heads or layers than a model has."""
        self.num_alibi_heads(num_heads)
        if self.alibi_layers > num_layers:
            raise _error("alibi_layers", self.alibi_layers, f"at most the {num_layers} layers of the model")

    def num_alibi_heads(self, num_heads: int, all_heads: bool = False) -> int:
        """How many of ``num_heads`` query heads have an ALiBi slope; ``all_heads``: in one of the ``alibi_layers``."""
        if self.position_encoding == "alibi" or all_heads:
            return num_heads
        if self.position_encoding != "nape":
            return 0
        if self.alibi_heads is not None and self.alibi_heads > num_heads:
            raise _error("alibi_heads", self.alibi_heads, f"at most the {num_heads} query heads of the model")
        return num_heads // 2 if self.alibi_heads is None else self.alibi_heads


def _error(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"sparse_attention.{name} is {value!r}; allowed: {allowed}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise _error(name, value, ", ".join(choices))


def _check_number(name: str, value: Any, low: float, high: float) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # False for NaN, infinity and integers beyond the range of floats.
    if not is_number or not low <= value <= min(high, sys.float_info.max):
        bounds = f"a number of at least {low}" if high == math.inf else f"a number in [{low}, {high}]"
        raise _error(name, value, bounds)
    return float(value)


def for_preset(fields: Mapping[str, Any], requested: Any) -> Mapping[str, Any]:
    """``fields`` that are given together with an attention implementation: for it, if that is a preset."""
    is_for_preset = isinstance(requested, str) and requested in PRESETS and isinstance(fields, Mapping)
    return {"preset": requested, **fields} if is_for_preset else fields


def merge_settings(stored: Mapping[str, Any] | None, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """``stored`` with ``overrides`` on top; a new preset brings its own alpha, length_scaling and top_k."""
    for values in (stored, overrides):
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(f"sparse_attention must be a mapping of fields, got {type(values).__name__}: {values!r}")
    merged, overrides = dict(stored or {}), dict(overrides or {})
    if overrides.get("preset", merged.get("preset")) != merged.get("preset"):
        for name in PRESETS["softmax"]:
            merged.pop(name, None)
    return {**merged, **overrides}
