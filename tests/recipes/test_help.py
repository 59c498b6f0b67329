"""Every recipe says, asked with --help, what it is and what each of its options does."""

import re
import runpy
import sys

import pytest
from tiny_run import RECIPES

SCRIPTS = [path for path in sorted(RECIPES.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help(path, monkeypatch, capsys):
    if path.stem in ("benchmark_attention", "benchmark_model"):
        pytest.importorskip("triton")
    # benchmark_attention.py gives its process a cache of its own.
    monkeypatch.setenv("TRITON_CACHE_DIR", "unused")
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0, shown
    about, options = re.split(r"^options:\n", shown, flags=re.MULTILINE)
    assert len(about.split("\n\n")[1].split()) >= 5
    entries = re.split(r"\n(?=  -)", options.rstrip())
    assert len(entries) >= 2
    for entry in entries:
        # Flags and their values, then the text: after two spaces or on a line of its own.
        flags, _, text = entry.strip().partition("  ")
        assert flags.startswith("-"), entry
        assert re.search(r"[a-z]{3}", re.sub(r"\(default: .*\)", "", text)), entry
        assert "(default: None)" not in text, entry
