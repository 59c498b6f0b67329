"""recipes/quickstart.py, with a training of two steps."""

import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
from tiny_run import forget_accelerate

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def quickstart():
    return runpy.run_path(str(RECIPES / "quickstart.py"))


def test_quickstart_trains_measures_and_says_where(quickstart, tmp_path, monkeypatch, capsys):
    """The recipes run one after the other in this process."""

    def run_here(commands, output, args):
        for script, *flags in commands.values():
            monkeypatch.setattr(sys, "argv", [script, *flags])
            forget_accelerate()
            try:
                runpy.run_path(script, run_name="__main__")
            finally:
                forget_accelerate()

    monkeypatch.setitem(quickstart["main"].__globals__, "run_together", run_here)
    flags = ["--output_dir", tmp_path, "--max_steps", 2, "--samples", 1, "--windows_per_document", 1]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, flags)])
    monkeypatch.chdir(tmp_path)
    quickstart["main"]()
    said = capsys.readouterr().out
    summary = (tmp_path / "summary.md").read_text()
    assert summary.strip() in said
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
        assert str(tmp_path / file) in said
        assert (tmp_path / file).is_file()
    sparse = perplexity["checkpoints"]["asentmax_nape"]["sparse_attention"]
    assert (sparse["preset"], sparse["position_encoding"]) == ("asentmax", "nape")
    assert perplexity["checkpoints"]["softmax_rope"]["sparse_attention"] is None


def test_processes_side_by_side(quickstart, tmp_path, capfd):
    """Each starts in the root of the repository and waits for the other, which must therefore run at the same time."""
    args = quickstart["QuickstartArguments"](poll_seconds=0)
    program = (
        "import os, sys; own, other = sys.argv[1:]; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], own); "
        "open(own, 'w').close()\nwhile not os.path.exists(other): pass"
    )
    files = [str(tmp_path / name) for name in "ab"]
    commands = {name: ["-c", program, *order] for name, order in (("one", files), ("two", files[::-1]))}
    assert quickstart["run_together"](commands, tmp_path, args) is None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name, file in zip(commands, files):
        said = (tmp_path / f"{name}.log").read_text()
        assert said == f"{RECIPES.parent} {max(1, cores // 2)} {file}\n"
    shown = capfd.readouterr().out
    assert shown.count("  python -c ") == 2
    assert re.search(r"^ +\d+ s  one: .* \| two: ", shown, re.MULTILINE)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_stops_what_was_started(quickstart, tmp_path, monkeypatch, capsys, number):
    child = (
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
        f"os.kill(os.getppid(), {int(number)}); time.sleep(600)"
    )
    names, run_together = quickstart["main"].__globals__, quickstart["run_together"]
    monkeypatch.setitem(names, "run_together", lambda _, *others: run_together({"child": ["-c", child]}, *others))
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as leaving:
        quickstart["main"]()
    assert leaving.value.code == 128 + number
    assert "quickstart.py: stopped by a signal" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize("name", ["max_steps", "samples", "windows_per_document"])
def test_what_would_fail_after_the_training_fails_before_it(quickstart, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", f"--{name}=0"])
    with pytest.raises(SystemExit) as leaving:
        quickstart["main"]()
    assert leaving.value.code == 2
    assert f"{name} is 0; allowed: at least 1" in capsys.readouterr().err


def test_progress_of_a_run_whose_last_line_was_cut(quickstart, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n{"step": 2')
    (tmp_path / "a.log").write_text("loading\n")
    assert quickstart["last_line"](tmp_path, "a") == "loading"
