"""Training states: whole or not there, checked when read, one writer."""

import pytest

from hf_sparse_attention.checkpoints import (
    CheckpointError,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    locked_folder,
    read_state,
    remove_old,
    write_checkpoint,
)

CONTENT = bytes(range(256)) * 40


def fill(folder):
    (folder / "model.safetensors").write_bytes(CONTENT)
    (folder / "shards").mkdir()
    (folder / "shards" / "0.bin").write_bytes(CONTENT[:-7])


def write(folder, step, contents=fill):
    target = folder / checkpoint_name(step)
    write_checkpoint(target, contents, {"step": step}, is_main=True, wait=lambda: None)
    return target


def test_written_and_read(tmp_path):
    target = write(tmp_path, 7)
    assert read_state(target) == {"step": 7}
    assert (target / "shards" / "0.bin").read_bytes() == CONTENT[:-7]
    write(tmp_path, 7)  # written again, e.g. by a continued run
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("name", ["model.safetensors", "shards/0.bin", "training_state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_named(tmp_path, name, damage):
    write(tmp_path, 3)
    target = write(tmp_path, 12)
    path = target / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        path.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    else:
        path.unlink()
    what = {"cut": "bytes instead of", "flip": "has changed", "remove": "is missing"}[damage]
    with pytest.raises(CheckpointError, match=f"{name}.*{what}.*--resume checkpoint-00000003"):
        read_state(target)


@pytest.mark.parametrize("content", [None, "", "{", "[]"], ids=["missing", "empty", "cut", "list"])
def test_damaged_manifest(tmp_path, content):
    target = write(tmp_path, 3)
    manifest = target / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_state(target)


def test_failed_write_leaves_the_last_good_state(tmp_path):
    good = write(tmp_path, 3)

    def fail(folder):
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(
        CheckpointError, match=rf"No space left on device; \d+ MiB free\); the last good state is .*{good.name}"
    ):
        write(tmp_path, 6, fail)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert read_state(good) == {"step": 3}


def test_newest_are_kept_and_rubble_removed(tmp_path):
    for step in (1, 20, 3, 100):
        write(tmp_path, step)
    (tmp_path / ".checkpoint-00000101.tmp").mkdir()
    remove_old(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000020", "checkpoint-00000100"]


def test_finding(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    write(tmp_path, 9)
    write(tmp_path, 10)
    (tmp_path / ".checkpoint-00000011.tmp").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-00000010"
    assert find_checkpoint(tmp_path, "checkpoint-00000009") == list_checkpoints(tmp_path)[0]
    with pytest.raises(CheckpointError, match="checkpoint-7: no such checkpoint"):
        find_checkpoint(tmp_path, "checkpoint-7")


def test_one_writer(tmp_path):
    with locked_folder(tmp_path / "run"):
        with pytest.raises(OSError, match="another process is writing"), locked_folder(tmp_path / "run"):
            pass
        with locked_folder(tmp_path / "other"):
            pass
    with locked_folder(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run: cannot be written"), locked_folder(tmp_path / "file" / "run"):
        pass
