"""Exact alpha-entmax attention in PyTorch operations, tile by tile, with the analytic backward; never Lq x Lk memory.

Forward, per query: the scores, their maximum m, the threshold tau relative to m, the sum Z of the weights. Only m, tau
and Z are kept; the backward recomputes the scores. With ``u = x ** (beta - 1)`` (see threshold.py), ``dP = dO V'`` and
the Jacobian of entmax (Peters et al., arXiv 1905.05702, section 3),

    dz = (u / Z) (dP - Delta),   Delta = sum(u dP) / sum(u),   dV = (x ** beta / Z)' dO.

The rows of a tile are its queries in all query heads of one key head, so grouped heads share keys without repeating
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .threshold import powers, score_factor, solve
from .tiles import Tile, plan_tiles
from .visibility import alibi_positions


@dataclass(eq=False)
class ChunkedAttention:
    """One call: its arguments (shapes as in :func:`~hf_sparse_attention.ops.sparse_attention`) and scratch memory.

    Half precisions are computed in float32. ``seed`` is an int64 tensor of one element, for dropout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: float
    scaling: float
    query_scale: Tensor | None = None
    slopes: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    attention_mask: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    top_k: int | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        self._dtype = torch.promote_types(self.query.dtype, torch.float32)
        self._group = self.query.shape[1] // self.key.shape[1]
        self._buffers: dict[int, Tensor] = {}
        self._distances: tuple[tuple, Tensor] | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output (B, Hq, Lq, Dv) and m, tau, Z as (3, B, Hq, Lq) in the compute dtype."""
        output = empty_output(self.query, self.value).zero_()
        statistics = self.query.new_zeros(3, *self.query.shape[:3], dtype=self._dtype)
        generator = self._generator()
        for tile in self._tiles():
            rows = self._rows(tile, self.query) * self._row_factor(tile)
            scores = self._scores(tile, rows)
            # A finite maximum leaves a row without a visible key at -inf, which gives it no weight.
            maximum = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(self._dtype).min)
            scores.sub_(maximum)
            cut = self._keep_top_k(scores)
            slope = scores if self.alpha == 1.0 else self._buffer(1, scores.shape)
            weight, tau, total = solve(scores, self.alpha, slope, self._buffer(2, scores.shape))
            if generator is not None:
                weight.mul_(self._dropout(generator, weight.shape))
            result = (weight @ self._keys(tile, self.value)).mul_(_inverse(total))
            self._store(tile, output, result)
            for statistic, values in zip(statistics, (maximum, tau if cut is None else cut, total)):
                self._store(tile, statistic, values[..., 0])
        return output, statistics

    def backward(
        self, grad_output: Tensor, statistics: Tensor, needs_query_scale: bool, needs_slopes: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of query, key, value, query_scale and slopes, contiguous, in the dtypes of what they belong to."""
        grad_query = torch.zeros_like(self.query, memory_format=torch.contiguous_format)
        # Transposed, the sums over tiles are products with a row-major tile, which are faster.
        grad_key, grad_value = (
            tensor.new_zeros(*tensor.shape[:2], tensor.shape[3], tensor.shape[2], dtype=self._dtype)
            for tensor in (self.key, self.value)
        )
        grad_scale = grad_query.new_zeros(self.query.shape[:3], dtype=self._dtype) if needs_query_scale else None
        grad_slopes = grad_query.new_zeros(self.query.shape[1], dtype=self._dtype) if needs_slopes else None
        generator = self._generator()
        for tile in self._tiles():
            query_rows, factor = self._rows(tile, self.query), self._row_factor(tile)
            rows = query_rows * factor
            maximum, tau, total = (self._rows(tile, statistic)[..., None] for statistic in statistics)
            scores = self._scores(tile, rows).sub_(maximum)
            if self.top_k is not None:
                scores.masked_fill_(scores < tau, -torch.inf)
            weight = powers(scores, tau, self.alpha, scores, self._buffer(1, scores.shape))
            slope = scores
            inverse = _inverse(total)

            output_rows = self._rows(tile, grad_output)
            grad = self._buffer(2, scores.shape)
            torch.bmm(output_rows, self._keys(tile, self.value).mT, out=grad)
            if generator is not None:
                keep = self._dropout(generator, weight.shape)
                grad.mul_(keep)
                weight = weight * keep
            self._accumulate(tile, grad_value, output_rows * inverse, weight)

            product = torch.mul(slope, grad, out=self._buffer(1, scores.shape))
            grad.sub_(product.sum(-1, keepdim=True).mul_(_inverse(slope.sum(-1, keepdim=True)))).mul_(slope)
            grad_rows = (grad @ self._keys(tile, self.key)).mul_(inverse)
            self._store(tile, grad_query, grad_rows * factor)
            self._accumulate(tile, grad_key, rows * inverse, grad)
            if grad_scale is not None:
                self._store(tile, grad_scale, (grad_rows * query_rows).sum(-1).mul_(self.scaling))
            if grad_slopes is not None:
                per_row = self._split(tile, grad).mul_(self._distance(tile)).sum(-1, keepdim=True)
                per_head = (per_row * self._split(tile, inverse)).sum((0, 3, 4))
                grad_slopes[self._query_heads(tile)].sub_(per_head.flatten())
        return (
            grad_query,
            grad_key.mT.to(self.key.dtype).contiguous(),
            grad_value.mT.to(self.value.dtype).contiguous(),
            None if grad_scale is None else grad_scale.to(self.query_scale.dtype),
            None if grad_slopes is None else grad_slopes.to(self.slopes.dtype),
        )

    def _tiles(self) -> Iterator[Tile]:
        # Dropout depends on the tiles, so they must not depend on what may change before the backward.
        threads = torch.get_num_threads() if self.dropout_p == 0.0 else 1
        return plan_tiles(self.query, self.key, self.key_start, self.key_end, threads)

    def _query_heads(self, tile: Tile) -> slice:
        return slice(tile.heads.start * self._group, tile.heads.stop * self._group)

    def _view(self, tile: Tile, tensor: Tensor) -> Tensor:
        """The tile's part of a tensor (B, Hq, Lq, ...): [nb, nh, G, c, ...]."""
        return tensor[tile.batch, self._query_heads(tile), tile.queries].unflatten(1, (-1, self._group))

    def _rows(self, tile: Tile, tensor: Tensor) -> Tensor:
        """The tile's part of a tensor (B, Hq, Lq, ...) in the compute dtype: [g, R, ...], R = G c rows."""
        view = self._view(tile, tensor).to(self._dtype)
        return view.reshape(-1, self._group * view.shape[3], *view.shape[4:])

    def _split(self, tile: Tile, rows: Tensor) -> Tensor:
        """Rows [g, R, ...] as [nb, nh, G, c, ...]."""
        sizes = (tile.batch.stop - tile.batch.start, -1, self._group, tile.queries.stop - tile.queries.start)
        return rows.view(*sizes, *rows.shape[2:])

    def _store(self, tile: Tile, tensor: Tensor, rows: Tensor) -> None:
        self._view(tile, tensor).copy_(self._split(tile, rows))

    def _keys(self, tile: Tile, tensor: Tensor) -> Tensor:
        """The tile's keys or values in the compute dtype: [g, K, D]."""
        return tensor[tile.batch, tile.heads, tile.keys].to(self._dtype).flatten(0, 1)

    def _accumulate(self, tile: Tile, total: Tensor, rows: Tensor, tile_matrix: Tensor) -> None:
        """Adds ``rows' tile_matrix`` to the tile's keys of ``total`` (B, Hk, D, Lk)."""
        part = total[tile.batch, tile.heads, :, tile.keys]
        part.view(-1, *part.shape[2:]).baddbmm_(rows.mT, tile_matrix)

    def _row_factor(self, tile: Tile) -> Tensor | float:
        """``scaling * query_scale`` of the rows, a number or [g, R, 1]."""
        if self.query_scale is None:
            return self.scaling
        return self._rows(tile, self.query_scale)[..., None] * self.scaling

    def _buffer(self, index: int, shape: torch.Size) -> Tensor:
        """Scratch memory; the same for every tile, because fresh memory is slow to touch."""
        size = shape.numel()
        if index not in self._buffers or self._buffers[index].numel() < size:
            self._buffers[index] = self.query.new_empty(size, dtype=self._dtype)
        return self._buffers[index][:size].view(shape)

    def _scores(self, tile: Tile, rows: Tensor) -> Tensor:
        """Scores times their factor, -inf where not visible: [g, R, K], in buffer 0."""
        keys, factor = self._keys(tile, self.key), score_factor(self.alpha)
        scores = self._buffer(0, torch.Size((*rows.shape[:2], keys.shape[1])))
        torch.baddbmm(scores, rows, keys.mT, beta=0.0, alpha=factor, out=scores)
        split = self._split(tile, scores)
        if self.slopes is not None:
            slopes = self.slopes[self._query_heads(tile)].to(self._dtype).view(-1, self._group, 1, 1)
            split.addcmul_(self._distance(tile), slopes, value=-factor)
        first, last = tile.keys.start, tile.keys.stop
        if tile.seen_from > first:
            self._hide(tile, split, slice(first, min(tile.seen_from, last)))
        if tile.seen_until < last:
            self._hide(tile, split, slice(max(tile.seen_until, first), last))
        if self.attention_mask is not None:
            split.add_(_bias(self._mask(tile), self._dtype))
        return scores

    def _hide(self, tile: Tile, split: Tensor, columns: slice) -> None:
        """Gives the keys ``columns`` a score of -inf for the queries that do not have them in their range."""
        keys = torch.arange(columns.start, columns.stop, device=split.device, dtype=torch.int32)
        visible = torch.ones((), dtype=torch.bool, device=split.device)
        for bound, is_inside in ((self.key_start, torch.ge), (self.key_end, torch.lt)):
            if bound is not None:
                bound = bound[tile.batch if bound.shape[0] > 1 else slice(None), tile.queries]
                visible = visible & is_inside(keys, bound[:, None, None, :, None])
        split[..., columns.start - tile.keys.start : columns.stop - tile.keys.start].add_(_bias(visible, self._dtype))

    def _mask(self, tile: Tile) -> Tensor:
        """The tile's part of the mask: [nb or 1, nh or 1, G or 1, c or 1, K or 1]."""
        slices = (tile.batch, self._query_heads(tile), tile.queries, tile.keys)
        part = self.attention_mask[
            tuple(s if size > 1 else slice(None) for s, size in zip(slices, self.attention_mask.shape))
        ]
        return part.unflatten(1, (-1, self._group)) if self.attention_mask.shape[1] > 1 else part[:, None]

    def _distance(self, tile: Tile) -> Tensor:
        """ALiBi distances of the tile: [nb or 1, 1, 1, c, K]; the tiles of other heads use the same."""
        identity = (tile.batch, tile.queries, tile.keys)
        if self._distances is None or self._distances[0] != identity:
            positions = alibi_positions(
                self.query.shape[2], self.key.shape[2], self.query_positions, self.key_positions, self.query.device
            )
            query_at, key_at = (
                position[tile.batch if position.shape[0] > 1 else slice(None), part]
                for position, part in zip(positions, (tile.queries, tile.keys))
            )
            # Offsets from one position are small enough for exact arithmetic in floating point.
            origin = query_at[:, :1]
            difference = (query_at - origin).to(self._dtype)[:, :, None] - (key_at - origin).to(self._dtype)[:, None]
            self._distances = identity, difference.abs_()[:, None, None]
        return self._distances[1]

    def _keep_top_k(self, scores: Tensor) -> Tensor | None:
        """Hides all but the ``top_k`` largest scores of each row; returns the cut below which scores are hidden."""
        if self.top_k is None:
            return None
        if self.top_k >= scores.shape[-1]:
            return scores.new_full((*scores.shape[:-1], 1), -torch.inf)
        largest = scores.topk(self.top_k + 1, dim=-1).values[..., -2:]
        # Half way to the next score, so that rounding in the backward's scores changes nothing.
        cut = torch.where(largest[..., 1:].isinf(), largest[..., :1], largest.mean(-1, keepdim=True))
        scores.masked_fill_(scores < cut, -torch.inf)
        return cut

    def _generator(self) -> torch.Generator | None:
        """The random numbers of this call: forward and backward draw the same ones, in the order of their tiles."""
        if self.dropout_p == 0.0:
            return None
        return torch.Generator(self.query.device).manual_seed(int(self.seed))

    def _dropout(self, generator: torch.Generator, shape: torch.Size) -> Tensor:
        keep = self._buffer(3, shape).bernoulli_(1.0 - self.dropout_p, generator=generator)
        return keep.div_(1.0 - self.dropout_p)


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Uninitialised (B, Hq, Lq, Dv), stored by token as the projection that follows wants it.

    Not a transposed view: autograd would forbid callers to change that in place.
    """
    batch, heads, length, dim = *query.shape[:3], value.shape[3]
    return query.new_empty_strided((batch, heads, length, dim), (length * heads * dim, dim, heads * dim, 1))


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(visible, 0.0, -torch.inf).to(dtype)


def _inverse(total: Tensor) -> Tensor:
    """1 / total, and 0 for rows without a visible key."""
    return torch.where(total == 0.0, 0.0, total.reciprocal())
