"""Training states on disk: written whole or not at all, checked when read, one process group per folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

MANIFEST = "manifest.json"
STATE = "training_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A training state cannot be written, found or trusted; the message names the file."""


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[None]:
    """Hold a folder; the system frees it when the process ends, however it ends.

    Raises:
        OSError: another process holds it, or it cannot be written.
    """
    lock = filelock.FileLock(Path(folder) / ".lock", timeout=0)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise OSError(f"{folder}: another process is writing to this folder") from error
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()


def checkpoint_name(step: int) -> str:
    """Name of the folder of the checkpoint after ``step`` optimizer steps."""
    return f"checkpoint-{step:08d}"


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def find_checkpoint(folder: str | Path, which: str) -> Path | None:
    """``latest`` in ``folder`` (None if there is none yet), or the checkpoint at the path ``which``."""
    if which == "latest":
        return next(reversed(list_checkpoints(folder)), None)
    for path in (Path(which), Path(folder) / which):
        if path.is_dir():
            return path
    raise CheckpointError(f"{which}: no such checkpoint, neither as a path nor in {folder}")


def write_checkpoint(
    target: Path, write: Callable[[Path], None], state: dict[str, Any], *, is_main: bool, wait: Callable[[], None]
) -> None:
    """Write a checkpoint under a temporary name and move it into place when it is complete.

    Args:
        target: the final folder.
        write: called in every process with the temporary folder.
        state: JSON values to keep beside what ``write`` wrote.
        is_main: whether this process does what is done once.
        wait: returns when every process has called it.

    Raises:
        CheckpointError: something could not be written (e.g. a full disk); the temporary folder is removed, and
            earlier checkpoints are untouched.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        wait()
        write(temporary)
        wait()
        if is_main:
            (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            write_manifest(temporary)
            _remove(target)
            temporary.rename(target)
        wait()
    except Exception as error:  # writers raise OSError, RuntimeError and types of their own
        # torch does not say that the disk is full.
        free = shutil.disk_usage(target.parent).free >> 20
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        last = next(reversed(list_checkpoints(target.parent)), None)
        kept = f"the last good state is {last}" if last else "there is no earlier state"
        raise CheckpointError(f"{target}: could not be written ({error}; {free} MiB free); {kept}") from error


def write_manifest(folder: Path) -> None:
    """Note size and checksum of every file, for :func:`read_state`."""
    entries = {name: _describe(folder / name) for name in _files(folder) if name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint, after checking every file against the manifest.

    Raises:
        CheckpointError: a file is missing, cut short or changed; the message names it.
    """
    entries = _read_json(folder / MANIFEST)
    for name, expected in entries.items():
        path = folder / name
        if not path.is_file():
            raise _broken(path, "is missing")
        actual = _describe(path)
        if actual["bytes"] != expected["bytes"]:
            raise _broken(path, f"has {actual['bytes']} bytes instead of {expected['bytes']}")
        if actual["crc32"] != expected["crc32"]:
            raise _broken(path, "has changed since it was written (checksum)")
    return _read_json(folder / STATE)


def set_aside_later(folder: str | Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step``; a run that goes on from there must not take them for its own.

    Returns:
        Their new places, ``replaced-checkpoint-...``.
    """
    later = [path for path in list_checkpoints(folder) if int(_NAME.fullmatch(path.name)[1]) > step]
    aside = [path.with_name(f"replaced-{path.name}") for path in later]
    for path, target in zip(later, aside, strict=True):
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
    return aside


def remove_old(folder: str | Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what interrupted processes left behind."""
    for path in list_checkpoints(folder)[:-keep]:
        _remove(path)
    for path in Path(folder).glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    # A half-removed folder must not look like a checkpoint.
    if path.exists():
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)


def _files(folder: Path) -> list[str]:
    found = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _describe(path: Path) -> dict[str, int]:
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": checksum}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _broken(path, "is missing") from None
    except (OSError, ValueError) as error:
        raise _broken(path, f"cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise _broken(path, "does not hold a JSON object")
    return values


def _broken(path: Path, what: str) -> CheckpointError:
    folder = path.parent
    while not _NAME.fullmatch(folder.name) and folder != folder.parent:
        folder = folder.parent
    others = [other.name for other in list_checkpoints(folder.parent) if other != folder]
    hint = f"; continue from another state with --resume {others[-1]}" if others else ""
    return CheckpointError(f"{path} {what}{hint}")
