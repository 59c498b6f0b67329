"""synthetic_speed.py: steps that are timed, and what it refuses before it times any."""

import json

import pytest
import synthetic_speed
from tiny_run import RECIPES

TINY = ["--configs", str(RECIPES / "configs" / "synthetic" / "tiny.yaml"), "--evaluate_length", "0"]
FEW = [*TINY, "--presets", "softmax", "--batch_sizes", "2", "--steps", "1"]


def test_steps_are_timed(tmp_path, capsys):
    synthetic_speed.main([*FEW, "--output", str(tmp_path / "speed.json")])
    (row,) = json.loads((tmp_path / "speed.json").read_text())["training"]
    assert (row["task"], row["preset"], row["batch"], row["step"]) == ("n_back", "softmax", 2, "eager")
    assert row["ms"] > 0
    assert "| n_back" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["steps", "batch_sizes", "evaluate_length"])
def test_bad_numbers_are_named(option, capsys):
    with pytest.raises(SystemExit) as leaving:
        synthetic_speed.main([*FEW, f"--{option}", "-1" if option == "evaluate_length" else "0"])
    assert leaving.value.code == 2
    assert f"{option} is" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file/speed\.json: could not be written"):
        synthetic_speed.main([*FEW, "--output", str(tmp_path / "file" / "speed.json")])
