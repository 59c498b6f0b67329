"""The comparison of measured runs: seeds together, RoPE scalings apart, parts that are missing left out."""

import json
import sys

import pytest
import real_text_report as recipe
from tiny_run import ROOT

from hf_sparse_attention.evaluation import plots

LENGTHS = [64, 128]


def cell(loss):
    return {"perplexity": 10 * loss, "loss": loss, "low": 9 * loss, "high": 11 * loss, "tokens": 32, "documents": 3}


def write(folder, losses, found=None, training=True):
    """A run with a loss at 64 and at 128 tokens, and a share of needles at each depth."""
    (folder / "perplexity").mkdir(parents=True)
    protocol = {"train_length": 64, "lengths": LENGTHS, "windows": 3, "target_tokens": 32, "documents": 3}
    labels = [folder.name] if folder.name.startswith("mine") else [folder.name, f"{folder.name}+yarn"]
    result = {
        "by_length": {str(n): cell(loss) for n, loss in zip(LENGTHS, losses)},
        "by_position": [{"first": 1, "last": 15, "loss": 3.0, "tokens": 9}],
    }
    content = {
        "protocol": {**protocol, "interval": "95% bootstrap"},
        "unigram_perplexity": 99.0,
        "checkpoints": dict.fromkeys(labels, result),
    }
    (folder / "perplexity" / "perplexity.json").write_text(json.dumps(content))
    for number, length in enumerate(LENGTHS if found else []):
        part = folder / f"needle{number}"
        part.mkdir()
        grids = {label: {"recall": {"s_niah_1": [[share[number]] for share in found]}} for label in labels}
        content = {"protocol": {"lengths": [length], "depths": [0.0, 1.0]}, "checkpoints": grids}
        (part / "needle.json").write_text(json.dumps(content))
    if training:
        line = {"step": 5, "loss": 2.5, "tokens": 640, "tokens_per_second": 1234.4, "memory_gb": 1.25}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 5, "eval_loss": 2.0}\n')
        (folder / "options.json").write_text('{"learning_rate": 0.002, "seed": 1}')


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    def run(*flags):
        arguments = ["--runs", tmp_path / "runs", "--output_dir", tmp_path / "report", *flags]
        monkeypatch.setattr(sys, "argv", ["real_text_report.py", *map(str, arguments)])
        (tmp_path / "report").mkdir(exist_ok=True)
        recipe.main()
        return capsys.readouterr().out

    return run


def row(table, start):
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {start} "))
    return [part.strip() for part in found.strip("|").split("|")][1:]


def test_tables_and_pictures(tmp_path, report):
    write(tmp_path / "runs" / "mine_s0", [2.0, 1.0], [[1.0, 0.5], [0.5, 0.0]])
    write(tmp_path / "runs" / "mine_s1", [3.0, 2.0], [[1.0, 0.5], [1.0, 1.0]])
    write(tmp_path / "runs" / "softmax_rope_s0", [2.5, 4.0], [[1.0, 0.0], [1.0, 0.0]])
    write(tmp_path / "runs" / "unmeasured_s0", [1.0, 1.0])
    (tmp_path / "runs" / "unmeasured_s0" / "perplexity" / "perplexity.json").unlink()
    (tmp_path / "runs" / "needle_samples").mkdir()
    out = report()
    table = (tmp_path / "report" / "real_text.md").read_text()
    assert table in out
    perplexity, needles, training = table.split("found")[0], table.split("found")[1], table.split("last training")[1]
    # Both seeds: their mean, and how far they are apart; only seed 0 is there to compare with.
    assert row(perplexity, "mine") == ["2", "25 (20 to 30)", "15 (10 to 20)", "-20.00%"]
    assert row(perplexity, "softmax_rope") == ["1", "25 [22.5, 27.5]", "40 [36, 44]", "+0.00%"]
    assert row(perplexity, "softmax_rope+yarn")[0] == "1"
    assert row(needles, "mine") == ["88%", "50%"]
    assert row(needles, "softmax_rope+yarn") == ["100%", "0%"]
    assert row(training, "mine_s1") == ["5", "640", "1,234", "1.2", "0.002", "2.500"]
    content = json.loads((tmp_path / "report" / "real_text.json").read_text())
    assert set(content["runs"]) == {"mine_s0", "mine_s1", "softmax_rope_s0"}
    assert content["runs"]["mine_s0"]["training"]["options"]["seed"] == 1
    for name in ("perplexity.png", "needles.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_not_finished(tmp_path, report):
    write(tmp_path / "runs" / "mine_s0", [2.0, 1.0], training=False)
    report()
    assert not (tmp_path / "report" / "needles.png").exists()
    assert row((tmp_path / "report" / "real_text.md").read_text(), "mine")[-1] == ""


def test_no_runs(tmp_path, report):
    (tmp_path / "runs" / "other").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds no folder VARIANT_sSEED"):
        report()


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_a_training_that_was_killed(tmp_path, report):
    write(tmp_path / "runs" / "mine_s0", [2.0, 1.0])
    with open(tmp_path / "runs" / "mine_s0" / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "loss": 2.5, "tokens_per_second": 1')
    assert row(report().split("last training")[1], "mine_s0")[0] == "5"


def test_what_cannot_be_compared_is_named(tmp_path, report):
    with pytest.raises(SystemExit, match=r"No such file or directory: '.*runs'"):
        report()
    runs = [tmp_path / "runs" / name for name in ("mine_s0", "other_s0")]
    for folder in runs:
        write(folder, [2.0, 1.0], [[1.0, 0.5], [0.5, 0.0]])
    file, needle = runs[1] / "perplexity" / "perplexity.json", runs[1] / "needle0" / "needle.json"
    good, protocol = json.loads(file.read_text()), json.loads(file.read_text())["protocol"]
    for changes, message in (
        (
            {"protocol": {**protocol, "lengths": [64, 256]}},
            r"other_s0 has lengths \[64, 256\], mine_s0 has \[64, 128\]",
        ),
        ({"protocol": {**protocol, "windows": 4}}, "other_s0 has windows 4, mine_s0 has 3"),
        ({"checkpoints": {"mine": good["checkpoints"]["other_s0"]}}, "perplexity.json of other_s0 measures 'mine'"),
        ({"checkpoints": {"mine_s0": good["checkpoints"]["other_s0"]}}, "other_s0 measures 'mine_s0'"),
        ({"checkpoints": {"other_s0": {}}}, "is not complete"),
    ):
        edit(file, **changes)
        with pytest.raises(SystemExit, match=message):
            report()
        edit(file, **good)
    edit(needle, protocol={"lengths": [64], "depths": [0.0, 0.5]})
    with pytest.raises(SystemExit, match="different depths"):
        report()
    needle.write_text("{")
    with pytest.raises(SystemExit, match=r"needle0/needle\.json is not valid JSON"):
        report()
    needle.write_text("[]")
    with pytest.raises(SystemExit, match=r"needle0/needle\.json does not hold"):
        report()
    (runs[0] / "options.json").unlink()
    with pytest.raises(SystemExit, match=r"mine_s0/options\.json"):
        report()
    assert not list((tmp_path / "report").iterdir())


@pytest.mark.parametrize("name", ["real_text", "real_text_first_layers"])
def test_committed_tables_are_those_of_the_committed_runs(name):
    folder = ROOT / "model_cards" / "results" / name
    written = json.loads((folder / "real_text.json").read_text(encoding="utf-8"))
    recipe.check_comparable(written["runs"])
    table = recipe.all_tables(written["runs"], written["reference"])
    assert table.strip() == (folder / "real_text.md").read_text(encoding="utf-8").strip()
    pictured = [path.stem.removeprefix("analysis_") for path in folder.glob("analysis_*.png")]
    assert [name for name in pictured if written["runs"][f"{name}_s0"]["analysis"] is None] == []


def test_a_variant_that_is_not_there_cannot_be_pictured(tmp_path, report):
    write(tmp_path / "runs" / "mine_s0", [2.0, 1.0])
    with pytest.raises(SystemExit, match="pictured: yours not among mine"):
        report("--pictured", "mine", "yours")
    assert list((tmp_path / "report").iterdir()) == []


def test_a_pictured_variant_without_needles_has_no_heat_map(tmp_path, report, monkeypatch):
    write(tmp_path / "runs" / "mine_s0", [2.0, 1.0])
    write(tmp_path / "runs" / "other_s0", [2.0, 1.0], [[1.0, 0.5], [0.5, 0.0]])
    drawn = {}
    monkeypatch.setattr(recipe, "plot_needles", lambda path, grids, *others: drawn.update(grids))
    monkeypatch.setattr(recipe, "replace_files", lambda folder, write: write(tmp_path / "report") or [])
    report("--pictured", "mine", "other")
    assert list(drawn) == ["other"]


def test_a_heat_map_is_blank_where_nothing_was_measured():
    longer = recipe.Measured({}, [], {"s_niah_1": {128: [1.0, 0.5]}})
    found = recipe.heat_maps(longer, ["s_niah_1", "s_niah_2"], LENGTHS, depths=2)
    nothing = pytest.approx(float("nan"), nan_ok=True)
    assert found == {"s_niah_1": [[nothing, 1.0], [nothing, 0.5]], "s_niah_2": [[nothing, nothing]] * 2}


@pytest.mark.parametrize(("losses", "panels"), [([2.0, 3.0], 2), ([2.0, 30.0], 3)])
def test_curves_far_apart_get_a_panel_for_the_lowest(tmp_path, monkeypatch, losses, panels):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    curves = {"mine": {"by_length": dict(zip(LENGTHS, map(cell, losses))), "by_position": [{"last": 9, "loss": 2.0}]}}
    plots.plot_perplexity(tmp_path / "curves.png", curves, train_length=64)
    (figure,) = drawn
    assert len(figure.axes) == panels
    if panels == 3:
        assert figure.axes[1].get_ylim() == pytest.approx((19.4, 32.0))
