"""Rows of benchmark_attention.py: measured while there is time, written one by one, then as a table and a picture."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse_attention.evaluation.plots import figure_grid, save_figure
from hf_sparse_attention.evaluation.report import format_table, write_json


class LeftOut(Exception):
    """Raised instead of returning a row; the message says why there is none."""


@dataclass
class Case:
    """One row to measure."""

    name: str
    measure: Callable[[], dict[str, Any]]


class Results:
    """Rows by section, and names of those that are left out.

    Args:
        path: file without suffix; .json, .md and .png are added.
        record: what identifies the run.
        max_seconds: nothing is begun after so many seconds; None for no limit.
    """

    def __init__(self, path: Path, record: dict[str, Any], max_seconds: float | None = None) -> None:
        self.path, self.record = path, record
        self.until = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.left_out: list[str] = []

    def measure(self, section: str, case: Case) -> None:
        """Measure a row and write it, unless the time is over."""
        try:
            if time.monotonic() >= self.until:
                raise LeftOut("no time left")
            row = case.measure()
        except LeftOut as reason:
            self.left_out.append(f"{section}, {case.name}: {reason}")
            print(f"left out: {self.left_out[-1]}", flush=True)
        else:
            self.rows.setdefault(section, []).append(row)
            cells = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            print(f"{section} {cells}", flush=True)
        # A whole file at any moment: a run may be ended while it writes.
        partial = self.path.with_suffix(".partial")
        write_json(partial, {**self.rows, "left_out": self.left_out, "run": self.record})
        partial.replace(self.path.with_suffix(".json"))

    def write_tables(self) -> None:
        """The tables, and the picture where there are rows for it; prints the ratios."""
        parts = [f"## {name}\n\n{table(rows)}" for name, rows in self.rows.items()]
        compared = ratios(self.rows.get("training", []))
        if compared:
            parts.insert(0, f"## ratios: time of the first contestant over that of each\n\n{table(compared)}")
            print(f"\n{table(compared)}\n", flush=True)
        if self.left_out:
            parts.append("## Left out\n\n" + "\n".join(f"- {what}" for what in self.left_out))
        if parts:
            self.path.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        drawn = [row for row in self.rows.get("training", ()) if row["head_dim"] == 64]
        if drawn:
            _plot(self.path.with_suffix(".png"), drawn)


_SHAPE = ("length", "heads", "key_heads", "head_dim", "empty_asked")


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forward, backward and their sum of the first contestant of each shape over those of each other one."""
    first: dict[tuple, dict[str, Any]] = {}
    compared = []
    for row in rows:
        ours = first.setdefault(tuple(row[key] for key in _SHAPE), row)
        if ours is not row:
            times = {name: ours[f"{name}_ms"] / row[f"{name}_ms"] for name in ("forward", "backward", "sum")}
            shape = {key: row[key] for key in (*_SHAPE, "empty_measured")}
            compared.append({**shape, "contestant": row["contestant"], **times})
    return compared


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a column for each key of any row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return format_table(keys, [[cell(row.get(key, "")) for key in keys] for row in rows])


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Forward and backward against the share of empty tiles, one panel per length, from 16384 on if there are such."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    lengths = [length for length in lengths if length >= 16384] or lengths
    figure, panels = figure_grid(1, len(lengths), width=4.5 * len(lengths), height=3.8)
    for axes, length in zip(panels[0], lengths):
        chosen = [row for row in rows if row["length"] == length]
        for number, name in enumerate(dict.fromkeys(row["contestant"] for row in chosen)):
            line = sorted((row["empty_measured"], row["sum_ms"]) for row in chosen if row["contestant"] == name)
            axes.plot(*zip(*line), marker="o", markersize=4, color=f"C{number}", label=name)
        axes.set_title(f"{length} tokens, head dimension 64", fontsize=9)
        axes.set_xlabel("share of empty tiles")
        axes.set_ylabel("forward + backward (ms)")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7, loc="lower left")
    save_figure(figure, path)
