"""Pictures of what attention does: against length, by layer and head, of one head, and of the experiments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluation.plots import figure_grid, length_axis, save_figure
from .statistics import by_head_type

_LABELS = {
    "support": "keys with a weight above 0",
    "entropy": "normalised entropy, H / log n",
    "scale": "scale t of the scores",
}
_HIDDEN_COLOR, _ZERO_COLOR = "0.85", "mistyrose"


def plot_against_length(path: Path, results: Mapping[str, Mapping[str, Any]], train_length: int | None) -> None:
    """Support, entropy and scale against visible keys: median over heads, shaded from the smallest to the largest.

    Args:
        results: per checkpoint the statistics as in ``AttentionStatistics.to_dict``; one line per checkpoint and type
            of head, dashed for heads with ALiBi.
    """
    figure, (panels,) = figure_grid(1, len(_LABELS), width=14.0, height=4.6)
    for axes, (measure, label) in zip(panels, _LABELS.items(), strict=True):
        for number, (name, result) in enumerate(results.items()):
            keys = torch.tensor(result["keys"], device="cpu").nanmean(0).tolist()
            summary = by_head_type(result, measure)
            for kind, curve in summary.items():
                style = {"color": f"C{number}", "linestyle": "--" if kind == "ALiBi" else "-"}
                title = name if len(summary) == 1 else f"{name}, {kind}"
                axes.plot(keys, curve["median"], marker="o", markersize=3, label=title, **style)
                axes.fill_between(keys, curve["low"], curve["high"], color=style["color"], alpha=0.1, linewidth=0)
        if measure == "support":
            axes.plot(keys, keys, color="0.5", linestyle=":", label="all visible keys")
            axes.set_yscale("log", base=2)
        elif measure == "entropy":
            axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel(label)
        length_axis(axes, "visible keys n", train_length)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(5, len(labels)),
        frameon=False,
        fontsize=8,
        handlelength=4,
    )
    save_figure(figure, path)


def plot_length_scales(path: Path, results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Maps of beta and gamma (layer x head), one row per checkpoint that has a length scale; grey where none applies.

    Returns:
        Whether there was one, and so a picture.
    """
    scaled = {
        name: result
        for name, result in results.items()
        if not torch.tensor(result["beta"], device="cpu").isnan().all()
    }
    if not scaled:
        return False
    first = torch.tensor(next(iter(scaled.values()))["beta"], device="cpu")
    height = (1.1 + 0.25 * first.shape[0]) * len(scaled)
    figure, grid = figure_grid(len(scaled), 2, width=3.0 + 0.5 * first.shape[1], height=height)
    for row, (name, result) in zip(grid, scaled.items(), strict=True):
        for axes, parameter, cmap in zip(row, ("beta", "gamma"), ("viridis", "RdBu_r"), strict=True):
            values = torch.tensor(result[parameter], device="cpu")
            # gamma has a sign: its colours are centred on 0
            limit = max(values.nan_to_num().abs().max().item(), 1e-6)
            low = {"vmin": -limit, "vmax": limit} if parameter == "gamma" else {"vmin": 0.0}
            image = axes.imshow(values.numpy(), cmap=cmap, aspect="auto", **low)
            axes.set_facecolor(_HIDDEN_COLOR)
            axes.set_title(f"{name}: {parameter}", fontsize=9)
            axes.set_xlabel("head", fontsize=8)
            axes.set_ylabel("layer", fontsize=8)
            for axis, count in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
                axis.set_ticks(range(0, count, 1 + count // 13))
            figure.colorbar(image, ax=axes)
    figure.suptitle("means over tokens; grey: no length scale", fontsize=8)
    save_figure(figure, path)
    return True


def plot_attention_maps(path: Path, maps: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Weights of one head per panel, on a logarithmic colour scale, with exact zeros in a colour of their own.

    Args:
        maps: per title the weights (L, L) and which keys are visible (L, L), as from ``attention_map``.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    figure, (panels,) = figure_grid(1, len(maps), width=4.8 * len(maps) + 1.4, height=4.8)
    for axes, (title, (weights, visible)) in zip(panels, maps.items(), strict=True):
        zeros = visible & (weights == 0)
        axes.imshow(
            zeros.numpy(), cmap=ListedColormap([_HIDDEN_COLOR, _ZERO_COLOR]), vmin=0, vmax=1, interpolation="nearest"
        )
        shown = weights.masked_fill(weights == 0, math.nan)
        image = axes.imshow(
            shown.numpy(), norm=LogNorm(1e-4, 1.0, clip=True), cmap="viridis_r", interpolation="nearest"
        )
        share = zeros.sum().item() / visible.sum().item()
        axes.set_title(f"{title}\n{share:.0%} of the visible weights are 0", fontsize=9)
        axes.set_xlabel("key", fontsize=8)
        axes.set_ylabel("query", fontsize=8)
    figure.colorbar(image, ax=panels, label="weight (1e-4 or less is one colour)", fraction=0.05)
    patches = [Patch(color=_ZERO_COLOR, label="exactly 0"), Patch(color=_HIDDEN_COLOR, label="not visible")]
    panels[0].legend(handles=patches, fontsize=7, loc="upper right")
    save_figure(figure, path)


def plot_experiments(path: Path, content: Mapping[str, Any]) -> None:
    """Entropy curves above, distances of two sequences that differ in one token below.

    Args:
        content: from ``experiments.run_experiments``.
    """
    dispersion, early = content["dispersion"], content["early_token"]
    distances = early["distance"]
    figure, grid = figure_grid(2, max(2, len(distances)), width=7.6, height=5.6)
    # Curves that coincide stay visible: later ones are thinner.
    styles = {
        name: {"label": name, "color": f"C{i}", "linewidth": 3.4 - 0.6 * i, "marker": "o", "markersize": 5 - 0.6 * i}
        for i, name in enumerate(dispersion["uniform"])
    }
    titles = {"uniform": "logits uniform in [0, 4]", "needles": "four logits at 4, the others in [0, 2]"}
    for axes, (kind, title) in zip(grid[0], titles.items()):
        for name, curve in dispersion[kind].items():
            axes.plot(dispersion["lengths"], curve["entropy"], **styles[name])
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("normalised entropy, H / log n")
        length_axis(axes, "number of logits n", None)
    smallest = min(d for curves in distances.values() for curve in curves.values() for d in curve if d > 0)
    for axes, (gap, curves) in zip(grid[1], distances.items()):
        for name, curve in curves.items():
            axes.plot(early["lengths"], curve, **styles[name])
        axes.set_yscale("log")
        axes.set_ylim(smallest / 1.5, 1.5)
        axes.set_title(f"score of the token that differs: {gap} above the others", fontsize=9)
        axes.set_ylabel("distance at the last token, relative")
        length_axis(axes, "length (tokens)", None)
    grid[0][0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)
