"""Pictures of the evaluation recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_perplexity(
    path: Path, results: Mapping[str, Mapping[str, Any]], train_length: int, unigram: float | None = None
) -> None:
    """Perplexity with its interval against length on the left, loss by position on the right; one line per checkpoint.

    Where curves are apart by a factor of 4, those near the lowest are also shown larger, in between.

    Args:
        results: per checkpoint ``by_length`` and ``by_position`` as in the recipe's JSON.
        unigram: perplexity without context, drawn as a dotted line.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    found = [cell["perplexity"] for result in results.values() for cell in result["by_length"].values()]
    panels = 3 if max(found) > 4 * min(found) else 2
    figure, (all_axes,) = figure_grid(1, panels, width=5.0 * panels, height=4.0)
    left, right, by_length = all_axes[0], all_axes[-1], all_axes[:-1]
    for number, (name, result) in enumerate(results.items()):
        style = {"color": f"C{number}", "marker": "o", "markersize": 4, "label": name}
        lengths = [int(length) for length in result["by_length"]]
        values = list(result["by_length"].values())
        for axes in by_length:
            axes.plot(lengths, [value["perplexity"] for value in values], **style)
        low, high = ([value[key] for value in values] for key in ("low", "high"))
        left.fill_between(lengths, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        buckets = result["by_position"]
        right.plot([bucket["last"] for bucket in buckets], [bucket["loss"] for bucket in buckets], **style)
    if unigram is not None:
        left.axhline(unigram, color="0.5", linestyle=":", label="unigram")
    left.set_yscale("log")
    bottom, top = left.get_ylim()
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8) if top < 30 * bottom else (1,)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    if panels == 3:
        all_axes[1].set_ylim(0.97 * min(found), 1.6 * min(found))
    right.set_ylabel("mean loss (nats per token)")
    length_axis(right, "position (tokens read before)", train_length)
    ticks = sorted({int(length) for result in results.values() for length in result["by_length"]})
    for axes in by_length:
        axes.set_ylabel("perplexity of the same target tokens")
        length_axis(axes, "context length (tokens)", train_length)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_needles(
    path: Path,
    grids: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    lengths: Sequence[int],
    depths: Sequence[float],
    train_length: int,
) -> None:
    """One heat map per checkpoint (row) and task (column).

    Args:
        grids: per checkpoint and task the recall, one row per depth, one column per length.
    """
    tasks = list(next(iter(grids.values())))
    width, height = 1.6 + 0.55 * len(lengths), 0.9 + 0.28 * len(depths)
    size = {"width": width * len(tasks) + 0.8, "height": height * len(grids) + 0.4}
    figure, axes_grid = figure_grid(len(grids), len(tasks), **size)
    beyond = next((i for i, length in enumerate(lengths) if length > train_length), len(lengths))
    for axes_row, (name, by_task) in zip(axes_grid, grids.items(), strict=True):
        for axes, task in zip(axes_row, tasks, strict=True):
            image = axes.imshow(by_task[task], vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            axes.set_title(f"{name}: {task}", fontsize=9)
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7, rotation=45)
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
            if 0 < beyond < len(lengths):
                axes.axvline(beyond - 0.5, color="white", linestyle="--", linewidth=1)
    note = "; trained left of the dashed line" if 0 < beyond < len(lengths) else ""
    # One for all columns, which can be narrower than it.
    figure.supxlabel(f"length (tokens){note}", fontsize=7)
    for axes in axes_grid[:, 0]:
        axes.set_ylabel("depth of the needle", fontsize=8)
    figure.colorbar(image, ax=axes_grid, label="needles found", fraction=0.05)
    save_figure(figure, path)


def figure_grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure (inches) on a canvas of its own, without global state or a display, and its axes [row, column]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def length_axis(axes: Axes, label: str, train_length: int | None) -> None:
    """Lengths on a logarithmic axis, with a line at the training length, if any."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel(label)
    if train_length is not None:
        axes.axvline(train_length, color="0.7", linestyle="--", linewidth=1)
        low, high = axes.get_xlim()
        # Near the right end it would leave the picture.
        side = "right" if train_length / low > (high / low) ** 0.7 else "left"
        place = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": side}
        axes.text(train_length, 0.02, " training length ", fontsize=7, **place)
    axes.grid(alpha=0.25)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
