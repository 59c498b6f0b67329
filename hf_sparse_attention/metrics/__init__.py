"""Metrics in the format of the ``evaluate`` library, shipped with the package so that they load without a network."""

from __future__ import annotations

from pathlib import Path


def metric_path(name: str) -> str:
    """The folder to give to ``evaluate.load``: ``evaluate.load(metric_path("needle_recall"))``.

    Raises:
        ValueError: there is no such metric; the message lists those there are.
    """
    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/*.py") if path.stem == path.parent.name)
    if name not in names:
        raise ValueError(f"there is no metric {name!r}; the package has: {', '.join(names)}.")
    return str(folder / name)
