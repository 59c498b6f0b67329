"""synthetic.py goes on with an interrupted run, and only with that one."""

import shutil
import sys

import pytest
import synthetic
from test_synthetic_run import read, run


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was killed while it wrote a line, after the checkpoint of step 40."""
    output = tmp_path_factory.mktemp("synthetic") / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "evaluate", lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(output, max_steps=40, save_steps=40, save_model=False)
    (output / "results.json").unlink()
    with open(output / "metrics.jsonl", "a") as log:
        log.write('{"step": 60, "sam')
    return output


def test_a_line_that_was_cut_does_not_stop_a_run(interrupted, tmp_path):
    output = shutil.copytree(interrupted, tmp_path / "run")
    assert run(output, max_steps=60, samples=0, resume="latest")["training"]["curve"]["step"] == [20, 40, 60]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, not 32"),
        ({"attn_implementation": "softmax"}, "attn_implementation is 'softmax', not 'asentmax'"),
        (
            {"sparse_attention": {"position_encoding": "nape", "alpha": 1.75}},
            "sparse_attention.alpha is 1.75, not 1.5",
        ),
        ({"task_options": {"alphabet": 16, "steps": 1}}, "task_options is {'alphabet': 16, 'steps': 1}, not None"),
    ],
    ids=["width", "preset", "alpha", "task"],
)
def test_a_run_does_not_go_on_with_another_model(interrupted, capsys, changes, message):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as leaving:
        run(interrupted, resume="latest", **changes)
    assert leaving.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("synthetic.py: error: ")
    assert message in error
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


def test_results_that_are_no_results_are_named(interrupted, tmp_path, capsys):
    output = shutil.copytree(interrupted, tmp_path / "run")
    (output / "results.json").write_text('{"status": "fini')
    with pytest.raises(SystemExit) as leaving:
        run(output, resume="latest")
    assert leaving.value.code == 1
    assert f"error: {output}/results.json is not what a run writes" in capsys.readouterr().err


def test_results_are_replaced_as_a_whole(interrupted, tmp_path, capsys, monkeypatch):
    output = shutil.copytree(interrupted, tmp_path / "run")
    (output / "results.json").write_text('{"status": "trained"}')

    def fill_the_disk(path, content):
        path.write_text('{"sta')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "write_json", fill_the_disk)
    with pytest.raises(SystemExit):
        run(output, max_steps=40, samples=0, resume="latest", save_model=False)
    assert f"error: {output}: could not be written" in capsys.readouterr().err
    assert read(output) == {"status": "trained"}
