"""The GPU benchmark on a machine without one: its errors, and what becomes of rows that are made up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import attention_results
import pytest
import torch
from attention_results import Case, LeftOut, Results

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a CUDA device"),
        (["--sections", "speed"], "sections: 'speed' is not known"),
        (["--max_seconds", "0"], "max_seconds is 0.0; allowed: a number above 0"),
    ],
    ids=["no GPU", "unknown section", "no time"],
)
def test_says_what_is_wrong(options, message):
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "recipes" / "benchmark_attention.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """What the benchmark takes for the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(attention_results.time, "monotonic", lambda: now[0])
    return now


def training_row(contestant: str, empty: float) -> dict:
    shape = {"length": 1024, "heads": 2, "key_heads": 2, "head_dim": 64, "empty_asked": empty}
    time = len(contestant) - empty
    times = {"forward_ms": time / 4, "backward_ms": time / 2, "sum_ms": time}
    return {**shape, "contestant": contestant, "empty_measured": empty + 0.01, **times}


def test_each_row_is_written_as_it_comes(tmp_path):
    results = Results(tmp_path / "out" / "rows", {"command": "python recipe"})

    def fails() -> dict:
        raise RuntimeError("out of memory")

    results.measure("training", Case("first", lambda: training_row("ours", 0.0)))
    with pytest.raises(RuntimeError):
        results.measure("training", Case("second", fails))
    written = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert written == {
        "training": [training_row("ours", 0.0)],
        "left_out": [],
        "run": {"command": "python recipe"},
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows.json"]


def test_begins_nothing_after_its_time(tmp_path, clock, capsys):
    results = Results(tmp_path / "rows", {}, max_seconds=10)

    def slow(contestant: str) -> dict:
        clock[0] += 6
        return training_row(contestant, 0.5)

    for contestant in ("ours", "theirs", "others"):
        results.measure("training", Case(f"1024 tokens, {contestant}", lambda name=contestant: slow(name)))
    results.write_tables()
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["contestant"] for row in written["training"]] == ["ours", "theirs"]
    assert written["left_out"] == ["training, 1024 tokens, others: no time left"]
    assert "left out: training, 1024 tokens, others: no time left" in capsys.readouterr().out
    text = (tmp_path / "rows.md").read_text()
    assert "## training" in text
    assert "- training, 1024 tokens, others: no time left" in text
    assert (tmp_path / "rows.png").stat().st_size > 0


def test_ratios_are_of_the_same_inputs(tmp_path, capsys):
    results = Results(tmp_path / "rows", {})
    for empty in (0.0, 1.0):
        for contestant in ("ours", "theirs"):
            results.measure("training", Case(contestant, lambda n=contestant, e=empty: training_row(n, e)))
    results.write_tables()
    found = attention_results.ratios(results.rows["training"])
    assert [(row["contestant"], row["empty_asked"], row["sum"]) for row in found] == [
        ("theirs", 0.0, 4 / 6),
        ("theirs", 1.0, 3 / 5),
    ]
    assert all(row["forward"] == row["backward"] == row["sum"] for row in found)
    assert "| 0.667 |" in capsys.readouterr().out
    assert "| 0.600 |" in (tmp_path / "rows.md").read_text()


def test_what_a_case_refuses_is_left_out_with_its_reason(tmp_path):
    results = Results(tmp_path / "rows", {})

    def refuse() -> dict:
        raise LeftOut("launching takes as long as running")

    results.measure("training", Case("1024 tokens", refuse))
    results.measure("decode", Case("90% empty", lambda: {"graph_ms": 1.0}))
    results.write_tables()
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["left_out"] == ["training, 1024 tokens: launching takes as long as running"]
    assert written["decode"] == [{"graph_ms": 1.0}]
    assert "training" not in written
    assert not (tmp_path / "rows.png").exists()


@pytest.fixture
def benchmark(monkeypatch):
    """The recipe as a module, whose measurements are made up: 1024 tokens are bound by the host."""
    pytest.importorskip("triton")
    # Importing the recipe points Triton to an empty cache.
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", ""))
    import benchmark_attention

    def measure(attend, inputs) -> dict:
        length = inputs[0].shape[2]
        return {"forward_ms": 1.0, "backward_ms": 1.0, "sum_ms": length / 1024, "host_ms": 0.9}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark_attention, "make_inputs", lambda b, h, hk, n, d, e: (torch.empty(b, h, n, d),))
    monkeypatch.setattr(benchmark_attention, "empty_share", lambda query: 0.25)
    monkeypatch.setattr(benchmark_attention, "measure", measure)
    monkeypatch.setattr(benchmark_attention, "run_record", lambda settings, device, processes: {"settings": settings})
    return benchmark_attention


@pytest.mark.parametrize("skip", [False, True], ids=["kept", "left out"])
def test_sizes_bound_by_the_host(benchmark, monkeypatch, tmp_path, skip):
    options = ["--lengths", "1024", "16384", "--head_dims", "64", "--empty", "0", "--flex_lengths", "7"]
    options += ["--sections", "training", "--output_dir", str(tmp_path), *(["--skip_host_bound"] if skip else [])]
    monkeypatch.setattr(sys, "argv", ["benchmark_attention.py", *options])
    benchmark.main()
    written = json.loads((tmp_path / "benchmark_attention.json").read_text())
    rows = written["training"]
    assert {row["length"] for row in rows} == ({16384} if skip else {1024, 16384})
    # Three contestants, and entmax of the entmax package at 1024 tokens.
    assert len(written["left_out"]) == (4 if skip else 0)
    grouped = [row["contestant"] for row in rows if row["key_heads"] == 4]
    assert grouped == ["ours (entmax 1.5)", "SDPA cuDNN (softmax)", "SDPA FlashAttention-2 (softmax)"]
    assert all(row["empty_measured"] == 0.25 and row["head_dim"] in (64, 128) for row in rows)


def test_shapes_with_adasplash(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "adasplash", lambda version: None)
    options = ["--lengths", "16384", "--empty", "0", "--flex_lengths", "7", "--sections", "training"]
    options += ["--adasplash_lengths", "16384", "--adasplash_head_dims", "64", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark_attention.py", *options])
    benchmark.main()
    rows = json.loads((tmp_path / "benchmark_attention.json").read_text())["training"]
    assert [row["head_dim"] for row in rows if "AdaSplash" in row["contestant"]] == [64]
    assert {row["head_dim"] for row in rows} == {64, 128}
