"""Folders that cannot be written, and disks that are full, for this process and for root too."""

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_VERSION = 0x20080522  # of the kernel's capability interface
_OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root ignores permissions


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made, removed or renamed in ``folder``, whoever runs the tests."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        with _permissions_matter():
            assert not os.access(folder, os.W_OK, effective_ids=True)
            yield
    finally:
        folder.chmod(mode)


@contextlib.contextmanager
def _permissions_matter() -> Iterator[None]:
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(_VERSION, 0)
    # Two times effective, permitted, inheritable. What is permitted still can be taken back.
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~_OVERRIDE
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk: no file of this process can grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
