"""Labels of the pictures do not cover each other and do not leave the picture."""

from itertools import combinations
from pathlib import Path

import pytest

from hf_sparse_attention.evaluation import plots


@pytest.fixture
def figures(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def labels(figure):
    """Texts with their boxes: axis labels, and notes within the axes."""
    figure.canvas.draw()
    texts = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts)]
    return [(text.get_text(), text.get_window_extent()) for text in (*texts, *figure.texts) if text.get_text()]


@pytest.mark.parametrize(("lengths", "line"), [([100], False), ([20, 24], False), ([24, 100], True)], ids=str)
def test_needles(figures, lengths, line):
    grid = [[0.5] * len(lengths)] * 2
    grids = {"a": dict.fromkeys(("s_niah_1", "s_niah_2", "s_niah_3"), grid)}
    plots.plot_needles(Path("unused"), grids, lengths, [0, 1], 32)
    found = labels(figures[0])
    assert any("dashed line" in text for text, _ in found) == line
    assert not [pair for pair in combinations(found, 2) if pair[0][1].overlaps(pair[1][1])]


@pytest.mark.parametrize("train_length", [16, 64])
def test_perplexity(figures, train_length):
    cells = {str(n): {"perplexity": 30.0, "low": 29.0, "high": 31.0} for n in (16, 32, 64)}
    positions = [{"last": 15, "loss": 3.0}, {"last": 63, "loss": 2.0}]
    plots.plot_perplexity(Path("unused"), {"a": {"by_length": cells, "by_position": positions}}, train_length)
    marks = [box for text, box in labels(figures[0]) if "training length" in text]
    assert len(marks) == 2
    panels = [axes.bbox for axes in figures[0].axes]
    assert all(any(panel.x0 <= box.x0 and box.x1 <= panel.x1 for panel in panels) for box in marks)
