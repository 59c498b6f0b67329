"""What benchmark_attention_cpu.py compares: functions of query, key and value, in a registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import entmax
import torch
from torch import Tensor

from hf_sparse_attention.ops import sparse_attention


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention.

    Attributes:
        attend: ``attend(query, key, value, alpha, is_causal)`` on (B, H, N, D) tensors, differentiable.
        computes: "entmax" or "softmax"; results are compared between contestants that compute the same.
        quadratic: holds N x N matrices, so that ``--dense_heads`` heads are computed at a time.
        alphas: the values of alpha that it supports; empty for all.
        help: one line for the table's legend.
    """

    attend: Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]
    computes: str
    help: str
    quadratic: bool = False
    alphas: tuple[float, ...] = ()


CONTESTANTS: dict[str, Contestant] = {}


def contestant(name: str, computes: str, **properties) -> Callable:
    """Registers the decorated function under ``name``; its docstring is the help."""

    def register(attend: Callable) -> Callable:
        CONTESTANTS[name] = Contestant(attend, computes, help=attend.__doc__, **properties)
        return attend

    return register


@contestant("chunked", "entmax")
def chunked(query: Tensor, key: Tensor, value: Tensor, alpha: float, is_causal: bool) -> Tensor:
    """sparse_attention(impl="chunked"): PyTorch operations, analytic backward"""
    return sparse_attention(query, key, value, alpha=alpha, is_causal=is_causal, impl="chunked")


@contestant("dense_entmax15", "entmax", quadratic=True, alphas=(1.5,))
def dense_entmax15(query: Tensor, key: Tensor, value: Tensor, alpha: float, is_causal: bool) -> Tensor:
    """all scores, entmax.entmax15, autograd"""
    return _dense(query, key, value, is_causal, lambda scores: entmax.entmax15(scores, dim=-1))


@contestant("dense_entmax15_k", "entmax", quadratic=True, alphas=(1.5,))
def dense_entmax15_partial(query: Tensor, key: Tensor, value: Tensor, alpha: float, is_causal: bool) -> Tensor:
    """the same, sorting only the 512 largest scores where they suffice"""
    return _dense(query, key, value, is_causal, lambda scores: entmax.entmax15(scores, dim=-1, k=512))


@contestant("dense_bisect", "entmax", quadratic=True)
def dense_bisect(query: Tensor, key: Tensor, value: Tensor, alpha: float, is_causal: bool) -> Tensor:
    """all scores, 24 steps of entmax.entmax_bisect, autograd"""
    return _dense(query, key, value, is_causal, lambda scores: entmax.entmax_bisect(scores, alpha, n_iter=24))


@contestant("sdpa", "softmax")
def sdpa(query: Tensor, key: Tensor, value: Tensor, alpha: float, is_causal: bool) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: softmax, a fused kernel"""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def _dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, weights: Callable[[Tensor], Tensor]) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill_(hidden, -torch.inf)
    return weights(scores) @ value
