"""recipes/quickstart.py, with a training of two steps."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def quickstart():
    return runpy.run_path(str(RECIPES / "quickstart.py"))


def test_quickstart_trains_measures_and_says_where(tmp_path):
    flags = ["--output_dir", tmp_path, "--max_steps", 2, "--samples", 1, "--windows_per_document", 1]
    command = [sys.executable, RECIPES / "quickstart.py", *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert summary.strip() in done.stdout
    perplexity = json.loads((tmp_path / "perplexity" / "perplexity.json").read_text())
    assert perplexity["protocol"]["lengths"] == [perplexity["protocol"]["train_length"] * n for n in (1, 2, 4, 8)]
    for name in ("softmax_rope", "asentmax_nape"):
        by_length = perplexity["checkpoints"][name]["by_length"]
        row = next(line for line in summary.splitlines() if line.startswith(f"| perplexity {name} "))
        assert [cell.strip() for cell in row.split("|")[2:-1]] == [
            f"{v['perplexity']:.4g}" for v in by_length.values()
        ]
        assert json.loads((tmp_path / name / "options.json").read_text())["max_steps"] == 2
    for file in ("perplexity/perplexity.png", "needle/needle.png"):
        assert str(tmp_path / file) in done.stdout
        assert (tmp_path / file).is_file()
    sparse = perplexity["checkpoints"]["asentmax_nape"]["sparse_attention"]
    assert (sparse["preset"], sparse["position_encoding"]) == ("asentmax", "nape")
    assert perplexity["checkpoints"]["softmax_rope"]["sparse_attention"] is None


def test_a_failing_step_stops_the_others_and_shows_its_log(quickstart, tmp_path):
    args = quickstart["QuickstartArguments"]()
    wait_for_ever = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    fail = (
        f"import os, sys\nwhile not os.path.exists({str(tmp_path / 'pid')!r}) "
        f"or not os.path.getsize({str(tmp_path / 'pid')!r}): pass\nsys.exit('no such thing')"
    )
    with pytest.raises(SystemExit, match=r"bad failed(.|\n)*no such thing"):
        quickstart["run_together"]({"good": ["-c", wait_for_ever], "bad": ["-c", fail]}, tmp_path, args)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
