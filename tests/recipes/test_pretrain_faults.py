"""Full disks, folders that cannot be written and damaged checkpoints: pretrain.py names them and loses nothing."""

import os
import re
import shutil

import pretrain as recipe
import pytest
import torch
from faulty_disk import largest_file, read_only
from tiny_run import copy_until, read_metrics, same_weights

from hf_sparse_attention.checkpoints import list_checkpoints, write_manifest


def test_full_disk_keeps_the_last_good_state(pretrain, trained, tmp_path, capsys):
    output = copy_until(trained, tmp_path / "run", 3)
    with pytest.raises(SystemExit) as leaving, largest_file(20_000):
        pretrain(output, resume="latest")
    assert leaving.value.code == 1
    message = capsys.readouterr().err
    assert "checkpoint-00000006: could not be written" in message
    assert "the last good state is" in message
    assert [path.name for path in output.glob("*checkpoint-*")] == ["checkpoint-00000003"]
    pretrain(output, resume="latest")
    assert read_metrics(output) == read_metrics(trained)


def test_full_disk_is_told_by_file(pretrain, trained, tmp_path, capsys):
    with pytest.raises(SystemExit), largest_file(5_000):
        pretrain(tmp_path / "run")
    assert f"error: {tmp_path / 'run'}: could not be written" in capsys.readouterr().err
    output = copy_until(trained, tmp_path / "other", 9)
    with pytest.raises(SystemExit), largest_file((output / "metrics.jsonl").stat().st_size - 40):
        pretrain(output, resume="latest")
    assert "metrics.jsonl: could not be written" in capsys.readouterr().err
    assert list_checkpoints(output)[-1].name == "checkpoint-00000009"


def test_read_only_folders(pretrain, trained, tmp_path, capsys):
    empty, run = tmp_path / "empty", copy_until(trained, tmp_path / "run", 9)
    empty.mkdir()
    with read_only(empty), pytest.raises(SystemExit) as leaving:
        pretrain(empty)
    assert leaving.value.code == 1
    assert f"error: {empty}: cannot be written (Permission denied)" in capsys.readouterr().err
    assert not list(empty.iterdir())

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with read_only(run), pytest.raises(SystemExit) as leaving:
        pretrain(run, resume="latest")
    assert leaving.value.code == 1
    assert re.search(f"error: {run}.*: could not be written .*Permission denied", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    pretrain(run, resume="latest", keep_checkpoints=9)
    assert read_metrics(run) == read_metrics(trained)


DAMAGE = {
    "cut": (lambda content: content[:-100], "has [0-9]+ bytes instead of"),
    "flipped": (lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:], "has changed"),
    "missing": (None, "is missing"),
}


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "training_state.json", "manifest.json"],
)
@pytest.mark.parametrize(("edit", "what"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_refused(pretrain, trained, tmp_path, capsys, name, edit, what):
    output = copy_until(trained, tmp_path / "run", 9)
    path = output / "checkpoint-00000009" / name
    content = path.read_bytes()
    path.unlink()
    if edit is not None:
        path.write_bytes(edit(content))
    with pytest.raises(SystemExit) as leaving:
        pretrain(output, resume="latest")
    assert leaving.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    # The manifest has no checksum of its own: it is no JSON any more, or it fits no file.
    expected = "" if name == "manifest.json" and edit is not None else f"{name} {what}"
    assert re.search(f"^pretrain.py: error: {path.parent}/.*{expected}.*--resume checkpoint-00000006$", error), error
    assert [folder.name for folder in list_checkpoints(output)][-2:] == ["checkpoint-00000006", "checkpoint-00000009"]


def test_after_damage_the_state_before_goes_on(pretrain, trained, tmp_path):
    output = copy_until(trained, tmp_path / "run", 9)
    (output / "checkpoint-00000009" / "optimizer.bin").unlink()
    pretrain(output, resume="checkpoint-00000006", keep_checkpoints=9)
    assert read_metrics(output) == read_metrics(trained)
    assert same_weights(output, trained)


def test_later_checkpoints_are_not_part_of_a_run_that_went_back(pretrain, trained, tmp_path, capsys):
    output = copy_until(trained, tmp_path / "run", 10)
    before = {path.name for path in output.glob("checkpoint-*")}
    again = {"keep_checkpoints": 2, "learning_rate": 5e-3}
    pretrain(output, resume="checkpoint-00000003", max_steps=4, save_steps=1, **again)
    kept = {"checkpoint-00000003", "checkpoint-00000004"}
    assert {path.name for path in list_checkpoints(output)} == kept
    assert {path.name for path in output.glob("replaced-*")} == {f"replaced-{name}" for name in before - kept}
    assert "replaced-checkpoint-00000009" in capsys.readouterr().out
    pretrain(output, resume="latest", max_steps=6, **again)
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 4, 5, 6]


def test_fewer_steps_than_were_made_are_refused(pretrain, trained, tmp_path, capsys):
    output = copy_until(trained, tmp_path / "run", 9)
    with pytest.raises(SystemExit) as leaving:
        pretrain(output, resume="latest", max_steps=8)
    assert leaving.value.code == 1
    assert f"max_steps is 8; {output}/checkpoint-00000009 is after step 9" in capsys.readouterr().err
    assert len(read_metrics(output)) == 10


def test_a_checkpoint_runs_no_code(pretrain, trained, tmp_path, capsys):
    """A changed file fails its checksum; one that comes with its checksum is not unpickled either."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    output = copy_until(trained, tmp_path / "run", 9)
    folder = output / "checkpoint-00000009"
    torch.save({"state": Payload()}, folder / "optimizer.bin")
    torch.save({"step": Payload()}, folder / "random_states_0.pkl")
    write_manifest(folder)
    with pytest.raises(SystemExit) as leaving:
        pretrain(output, resume="latest")
    assert leaving.value.code == 1
    assert f"{folder}: could not be restored" in capsys.readouterr().err
    shutil.copy(trained / folder.name / "optimizer.bin", folder)
    write_manifest(folder)
    pretrain(output, resume="latest")  # accelerate goes on without the random states
    assert not (tmp_path / "executed").exists()


def test_optimizer_that_was_not_restored_is_refused(pretrain, trained, tmp_path, capsys, monkeypatch):
    # FSDP2 with accelerate before 1.13 loads the weights and quietly starts a new optimizer.
    output = copy_until(trained, tmp_path / "run", 9)
    original = recipe.Accelerator.load_state

    def forgetful(accelerator, *args):
        original(accelerator, *args)
        for values in accelerator._optimizers[0].state.values():
            values["step"].fill_(1)

    monkeypatch.setattr(recipe.Accelerator, "load_state", forgetful)
    with pytest.raises(SystemExit):
        pretrain(output, resume="latest")
    assert "restored an optimizer of 1 steps instead of 9" in capsys.readouterr().err
