"""benchmark_attention_cpu.py on lengths that take no time: what it writes, and what it refuses."""

import json
import subprocess
import sys

import pytest
from tiny_run import RECIPES


def benchmark(tmp_path, *flags):
    script = RECIPES / "benchmark_attention_cpu.py"
    command = [sys.executable, script, "--output_dir", tmp_path, "--threads", 1, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def test_measures_the_contestants_side_by_side(tmp_path):
    sizes = ["--lengths", 63, "--heads", 2, "--head_dim", 12, "--repeats", 2]
    done = benchmark(tmp_path, "--contestants", "chunked", "dense_entmax15", *sizes)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "benchmark_attention_cpu.json").read_text())
    results = content["by_length"]["63"]
    assert list(results) == ["chunked", "dense_entmax15"]
    for result in results.values():
        assert result["sum_s"] == pytest.approx(result["forward_s"] + result["backward_s"])
        assert len(result["turns"]) == 2
        assert result["extra_mib"] >= 0
    ratio = results["chunked"]["sum_s"] / results["dense_entmax15"]["sum_s"]
    assert results["dense_entmax15"]["first_over_this"]["sum_s"] == pytest.approx(ratio)
    # Both compute the same attention of the same inputs.
    assert results["dense_entmax15"]["largest_difference_from_first"] < 1e-5
    assert content["run"]["settings"]["heads"] == 2
    assert content["run"]["machine"]["cpu_threads"] == 1
    assert "length 63" in (tmp_path / "benchmark_attention_cpu.md").read_text()
    assert (tmp_path / "benchmark_attention_cpu.png").stat().st_size > 1000
    assert f"{ratio:.3f}" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contestants", "chunked", "magic"], "'magic' is not known"),
        (["--contestants", "dense_entmax15", "--alpha", "1.25"], "does not compute alpha = 1.25"),
        (["--repeats", "0"], "repeats is 0"),
        (["--lengths", "0"], "lengths are [0]"),
        (["--dtype", "int8"], "dtype is 'int8'"),
    ],
    ids=["contestant", "alpha", "repeats", "lengths", "dtype"],
)
def test_refuses(flags, message, capsys, monkeypatch, tmp_path):
    import benchmark_attention_cpu

    monkeypatch.setattr(sys, "argv", ["benchmark_attention_cpu.py", "--output_dir", str(tmp_path / "none"), *flags])
    with pytest.raises(SystemExit) as exit:
        benchmark_attention_cpu.main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    import benchmark_attention_cpu

    (tmp_path / "file").write_text("")
    turn = {"forward_s": 1.0, "backward_s": 1.0, "sum_s": 2.0, "cpu_s": 1.0, "extra_mib": 1.0, "heads_at_once": 1}
    result = {"chunked": {**turn, "turns": [], "first_over_this": turn}}
    monkeypatch.setattr(benchmark_attention_cpu, "compare", lambda args, length: result)
    monkeypatch.setattr(sys, "argv", ["benchmark_attention_cpu.py", "--output_dir", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit, match=r"error: .*file/out: could not be written"):
        benchmark_attention_cpu.main()
    assert "length 8192" in capsys.readouterr().out


def test_a_failing_contestant_ends_the_run_with_its_error(capsys, monkeypatch, tmp_path):
    import benchmark_attention_cpu

    class FailingWorker:
        def __init__(self, name, problem):
            self.name = name

        def measure(self):
            raise RuntimeError(f"{self.name}: RuntimeError: out of memory")

        def close(self):
            pass

    monkeypatch.setattr(benchmark_attention_cpu, "Worker", FailingWorker)
    monkeypatch.setattr(sys, "argv", ["benchmark_attention_cpu.py", "--output_dir", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as exit:
        benchmark_attention_cpu.main()
    assert "length 8192: chunked: RuntimeError: out of memory" in str(exit.value)
    assert not (tmp_path / "none").exists()
