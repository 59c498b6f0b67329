"""Many runs side by side, their table and picture; the ladder of lengths; every supplied configuration."""

import dataclasses
import json
import os
import signal

import pytest
import synthetic_report
import synthetic_suite as suite
import torch
from synthetic_model import build_model
from synthetic_options import EvalOptions, TaskOptions, TrainOptions
from synthetic_report import make_table, samples_seen, write_report
from tiny_run import RECIPES, ROOT, as_flags

from hf_sparse_attention.arguments import ArgumentError, parse
from hf_sparse_attention.data.synthetic import IGNORED_LABEL, make_task
from hf_sparse_attention.evaluation import synthetic as evaluation
from hf_sparse_attention.evaluation.synthetic import Cell, LadderOptions, run_ladder, target_index, wilson

CONFIGS = sorted((RECIPES / "configs" / "synthetic").glob("*.yaml"))
SUITES = [path for path in CONFIGS if path.stem.startswith("suite")]
# What the paper's runs have: layers, width, heads, steps, learning rate.
PAPER = {
    "copy": (2, 256, 16, 156250, 1e-3),
    "sort": (2, 256, 8, 312500, 4e-4),
    "reverse": (6, 256, 8, 234375, 4e-4),
    "mqmtar": (4, 512, 16, 390625, 2e-4),
}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in SUITES], ids=lambda path: path.stem)
def test_configs(path):
    task_options, train_options, _ = parse(TaskOptions, TrainOptions, EvalOptions, argv=[str(path)])
    with torch.device("meta"):
        model = build_model(task_options)
    stages = train_options.all_stages(task_options.trained_tasks())
    assert len(stages) == len(train_options.stage_lengths or stages)
    assert model.config.num_hidden_layers == task_options.layers
    assert path.stem.split("_")[0] in ("tiny", task_options.task)
    if path.stem in PAPER:
        assert PAPER[path.stem] == (
            task_options.layers,
            task_options.hidden_size,
            task_options.heads,
            train_options.max_steps,
            train_options.learning_rate,
        )
        assert (train_options.batch_size, train_options.warmup_steps, train_options.weight_decay) == (128, 20000, 0)
        assert (train_options.adam_beta1, train_options.adam_beta2) == (0.9, 0.99)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suites(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (options,) = parse(suite.SuiteOptions, argv=[str(path)])
    runs = suite.list_runs(options)
    assert len(runs) == len(options.tasks) * len(options.variants) * len(options.seeds)
    if path.stem == "suite":
        assert len(runs) == 20
        assert {run.name.split("/")[0] for run in runs} == set(PAPER)


def make_options(tmp_path, **changes):
    base = {
        "tasks": {"n_back": str(RECIPES / "configs" / "synthetic" / "tiny.yaml")},
        "variants": {"softmax": {"attn_implementation": "softmax"}, "asentmax": {"attn_implementation": "asentmax"}},
        "options": {"max_steps": 20, "samples": 20, "generate": 0},
        "output_dir": str(tmp_path / "out"),
        "runs_per_device": 2,
    }
    return {**base, **changes}


@pytest.mark.timeout(180)
def test_runs_side_by_side(tmp_path, capsys, monkeypatch):
    """One run works, the other's loss is not finite: it is reported, and both are in the table."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = as_flags(make_options(tmp_path, overrides={"*/softmax/*": {"learning_rate": 1e30, "max_grad_norm": 1e30}}))
    with pytest.raises(SystemExit) as stop:
        suite.main(flags)
    assert stop.value.code == "synthetic_suite.py: failed: n_back/softmax/seed0"
    said = capsys.readouterr().out
    assert "n_back/softmax/seed0: failed: synthetic.py: error: the loss is nan" in said
    assert "n_back/asentmax/seed0: finished" in said
    output = tmp_path / "out"
    runs = json.loads((output / "synthetic.json").read_text(encoding="utf-8"))["runs"]
    assert {run["name"]: run["status"][:8] for run in runs} == {
        "n_back/asentmax/seed0": "finished",
        "n_back/softmax/seed0": "stopped:",
    }
    table = (output / "synthetic.md").read_text(encoding="utf-8")
    assert "ASEntmax (NAPE)" in table
    assert "stopped: the loss is nan" in table
    assert (output / "synthetic.png").stat().st_size > 10_000
    done = (output / "n_back/asentmax/seed0/results.json").stat().st_mtime_ns
    suite.main([*flags, "--only", "n_back/asentmax"])
    assert "0 of 1 runs to do" in capsys.readouterr().out
    assert (output / "n_back/asentmax/seed0/results.json").stat().st_mtime_ns == done


def test_a_signal_stops_what_was_started(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, signal, time\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(suite, "SCRIPT", str(script))
    with pytest.raises(SystemExit) as leaving:
        suite.main(as_flags(make_options(tmp_path, runs_per_device=1)))
    assert leaving.value.code == 128 + signal.SIGTERM
    assert "synthetic_suite.py: stopped by a signal" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"output_dir: .* holds no results\.json of a run"):
        suite.main(["--report_only", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .*/dev/null/out"):
        suite.main(as_flags(make_options(tmp_path, output_dir="/dev/null/out")))
    run = tmp_path / "out" / "n_back" / "softmax" / "seed0"
    run.mkdir(parents=True)
    (run / "results.json").write_text("{")
    for flags in (as_flags(make_options(tmp_path)), ["--report_only", "--output_dir", str(tmp_path / "out")]):
        with pytest.raises(SystemExit, match=r"seed0/results\.json is not"):
            suite.main(flags)
    assert not list((tmp_path / "out").glob("synthetic.*"))


def parsed(tmp_path, **changes):
    return parse(suite.SuiteOptions, argv=as_flags(make_options(tmp_path, **changes)))[0]


def test_options_are_put_together(tmp_path):
    options = parsed(
        tmp_path,
        seeds=[0, 1],
        options={"max_steps": 5, "sparse_attention": {"gamma_range": 1.0}},
        variants={"a": {"attn_implementation": "asentmax", "sparse_attention": {"position_encoding": "nape"}}},
        overrides={"n_back/*": {"max_steps": 6, "batch_size": 3}, "*/seed1": {"max_steps": 7}},
    )
    first, second = suite.list_runs(options)
    assert (first.name, second.name) == ("n_back/a/seed0", "n_back/a/seed1")
    assert first.options["sparse_attention"] == {"gamma_range": 1.0, "position_encoding": "nape"}
    assert (first.options["max_steps"], first.options["batch_size"], first.options["seed"]) == (6, 3, 0)
    assert (second.options["max_steps"], second.options["batch_size"], second.options["seed"]) == (7, 3, 1)


def test_runs_are_divided_between_devices(tmp_path, monkeypatch):
    options = parsed(tmp_path, seeds=[0, 1, 2], devices={"n_back/asentmax/seed2": 4})
    runs = suite.list_runs(options)
    monkeypatch.setattr(suite, "visible_devices", lambda: [5, 7, 9])
    monkeypatch.setattr(suite, "start", lambda run, output, threads: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        suite.run_all(runs, tmp_path, options)
    assert [run.device for run in runs] == [5, 7, 9, 5, 7, 7]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": {}}, ["tasks", "variants"]),
        ({"variants": {"a": {"attn_implementation": "sdpa"}}}, ["n_back/a/seed0", "sdpa"]),
        ({"overrides": {"*": {"lr": 1}}}, ["n_back/softmax/seed0", "lr"]),
        ({"only": ["copy/*"]}, ["only", "copy/*"]),
        ({"runs_per_device": 0}, ["runs_per_device"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_suites_are_named(tmp_path, changes, words):
    with pytest.raises(ArgumentError) as error:
        suite.list_runs(parsed(tmp_path, **changes))
    assert all(word in str(error.value) for word in words)


def cell(length, share, samples=100):
    low, high = wilson(round(share * samples), samples)
    return Cell(length, length + 3, samples, share, low, high, share, 0, 0, 0, 0.5)


def fake_run(preset, shares, left_out=()):
    return {
        "task": "sort",
        "status": "finished",
        "attention": {"preset": preset, "position_encoding": "nape"},
        "train_lengths": [32, 64],
        "training": {"samples": 3_000_000, "curve": {"step": [50, 100], "loss": [2.0, 0.5]}},
        "run": {"settings": {"batch_size": 512}},
        "evaluation": {
            "cells": [dataclasses.asdict(cell(64 * 2**i, share)) for i, share in enumerate(shares)],
            "not_measured": dict(left_out),
        },
    }


def test_table_in_the_papers_form():
    variants = {
        "ASEntmax (NAPE)": [fake_run("asentmax", [1.0, 0.98, 0.5]), fake_run("asentmax", [1.0, 0.9, 0.25])],
        "Softmax (NAPE)": [fake_run("softmax", [1.0, 0.0], {"256": "nothing right"})],
        "Entmax (NAPE)": [fake_run("entmax", [1.0, 0.7], {"256": "time"})],
    }
    lines = make_table(variants).splitlines()
    assert [part.strip() for part in lines[0].split("|")[1:-1]] == [
        "exact match, %",
        "seeds",
        "samples seen",
        "1x",
        "2x",
        "4x",
    ]
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in lines[2:]]
    assert rows[0] == ["ASEntmax (NAPE)", "2", "3.00M", "100.0 / 100.0", "98.0 / 90.0", "50.0 / 25.0"]
    # Nothing right at a shorter length counts as nothing right; what was not measured is not a number.
    assert rows[1][3:] == ["100.0", "0.0", "0.0"]
    assert rows[2][3:] == ["100.0", "70.0", "-"]


def test_report_reads_the_folders(tmp_path):
    for name, preset in (("a", "asentmax"), ("b", "softmax")):
        folder = tmp_path / "sort" / name / "seed0"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(fake_run(preset, [1.0, 0.5])))
    text = write_report(tmp_path)
    assert text.startswith("### sort")
    assert "ASEntmax (NAPE)" in text
    assert "Softmax (NAPE)" in text
    assert (tmp_path / "synthetic.png").stat().st_size > 10_000


def test_no_two_curves_of_a_task_have_one_colour(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(synthetic_report, "save_figure", lambda figure, path: drawn.append(figure))
    run = fake_run("asentmax", [1.0, 0.5])
    for count in (3, 13):
        grouped = {task: {f"{task}{i}": [run] for i in range(count)} for task in "ab"}
        synthetic_report.plot(tmp_path / "unused.png", grouped)
        for axes in drawn.pop().axes:
            assert len({line.get_color() for line in axes.lines}) == len(axes.lines) == count


def test_differently_trained_runs_are_not_seeds(tmp_path):
    """Rows of their own, named after the settings that differ; a seed is not one of them."""
    for name, settings in {
        "a": {"batch_size": 128, "learning_rate": 1e-3, "seed": 0},
        "b": {"batch_size": 512, "learning_rate": 1e-3, "seed": 0},
        # Newer than the others: it has options that they lack, at their defaults.
        "c": {"batch_size": 512, "learning_rate": 1e-3, "seed": 1, "init_from": None, "start_dropout": 0.0},
    }.items():
        (tmp_path / name).mkdir()
        content = {**fake_run("asentmax", [1.0]), "run": {"settings": settings}}
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    rows = [[part.strip() for part in line.split("|")[1:3]] for line in write_report(tmp_path).splitlines()[4:]]
    assert rows == [["ASEntmax (NAPE), batch_size 128", "1"], ["ASEntmax (NAPE), batch_size 512", "2"]]


@pytest.mark.parametrize("folder", ["synthetic", "synthetic_recall", "synthetic_reverse"])
def test_committed_tables_are_those_of_the_committed_runs(folder, tmp_path):
    committed = ROOT / "model_cards" / "results" / folder
    runs = list(committed.glob("**/results.json"))
    assert len(runs) > 1
    for path in runs:
        copy = tmp_path / path.relative_to(committed)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(path.read_bytes())
    assert write_report(tmp_path).strip() == (committed / "synthetic.md").read_text(encoding="utf-8").strip()


def test_committed_rows_are_those_of_the_committed_runs():
    committed = ROOT / "model_cards" / "results" / "synthetic"
    rows = (committed / "README.md").read_text(encoding="utf-8")
    for path in committed.glob("*/results.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        seen, seconds = samples_seen(results), results["training"]["seconds"]
        assert f"| {path.parent.name} | {seen:,} | {seconds:.0f} |" in rows


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson(successes, samples, low, high):
    assert wilson(successes, samples) == pytest.approx((low, high), abs=1e-4)


def ladder(monkeypatch, shares, options, seconds=0.0):
    clock = [0.0]

    def measure(model, task, length, options):
        clock[0] += seconds
        return dataclasses.replace(cell(length, shares[length], options.count(length)), seconds=seconds)

    monkeypatch.setattr(evaluation, "measure", measure)
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: clock[0])
    return run_ladder(torch.nn.Linear(1, 1), None, list(shares), options)


def test_ladder_stops_where_nothing_is_right(monkeypatch):
    results = ladder(monkeypatch, {256: 0.5, 64: 1.0, 128: 0.9, 512: 0.0, 1024: 0.0, 2048: 0.3}, LadderOptions())
    assert [cell["length"] for cell in results["cells"]] == [64, 128, 256, 512]
    assert results["not_measured"] == {"1024": "nothing right", "2048": "nothing right"}


def test_ladder_stops_in_time(monkeypatch):
    shares = {64 * 2**i: 0.5 for i in range(8)}
    results = ladder(monkeypatch, shares, LadderOptions(seconds=45.0), seconds=10.0)
    # Three lengths take 30 s; another is expected to take more than the 15 s that are left.
    assert [cell["length"] for cell in results["cells"]] == [64, 128, 256]
    assert set(results["not_measured"].values()) == {"time"}


def test_samples_of_a_length():
    options = LadderOptions()
    counts = [options.count(length) for length in (64, 4096, 8192, 16384, 65536, 1 << 20)]
    assert counts == [1000, 1000, 500, 250, 62, 32]
    assert LadderOptions(samples=10, min_samples=32).count(65536) == 10


@pytest.mark.parametrize("name", ["mqmtar", "copy", "local_count", "flip_flop"])
def test_target_index(name):
    task = make_task(name)
    samples = task.sample(7, (10, 40), torch.Generator().manual_seed(1))
    index, labels = target_index(samples.labels, task.label_tokens(40))
    assert index.shape == labels.shape == (7, task.label_tokens(40))
    for row in range(7):
        places = (samples.labels[row] != IGNORED_LABEL).nonzero()[:, 0]
        count = len(places)
        assert index[row, :count].tolist() == (places - 1).tolist()
        assert labels[row, :count].tolist() == samples.labels[row, places].tolist()
        assert set(labels[row, count:].tolist()) <= {IGNORED_LABEL}
