"""Programs in processes of their own that need not import everything again: forks of one that has done so."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Answers each line, a program and its arguments, with its exit code; what it prints goes to the files that are named.
_SERVER = """
import json, os, sys
exec(sys.argv[1])
print("ready", flush=True)
for _line in sys.stdin:
    _request = json.loads(_line)
    _child = os.fork()
    if _child == 0:
        for _name, _number in (("input", 0), ("stdout", 1), ("stderr", 2)):
            _file = os.open(_request[_name], os.O_RDWR | os.O_CREAT)
            os.dup2(_file, _number)
            os.close(_file)
        sys.stdin = open(0)
        sys.argv = ["-c", *_request["arguments"]]
        _code = 1
        try:
            exec(compile(_request["program"], "<program>", "exec"))
            _code = 0
        except SystemExit as _leaving:
            _code = _leaving.code if isinstance(_leaving.code, int) else 0 if _leaving.code is None else 1
            if isinstance(_leaving.code, str):
                print(_leaving.code, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_code)
    print(os.waitstatus_to_exitcode(os.waitpid(_child, 0)[1]), flush=True)
"""


class Forked:
    """Runs programs in forks of a process that has executed ``start``; see :func:`forking`."""

    def __init__(self, server: subprocess.Popen, folder: Path) -> None:
        self.server, self.folder, self.count = server, folder, 0

    def __call__(self, program: str, *arguments: Any) -> subprocess.CompletedProcess:
        """What ``python -c PROGRAM ARGUMENTS`` would give, with the names of ``start`` defined in the program."""
        if self.server.poll() is not None:
            raise RuntimeError("the process that forks has ended")
        self.count += 1
        files = {name: self.folder / f"{self.count}.{name}" for name in ("stdout", "stderr")}
        request = {"program": program, "arguments": [str(argument) for argument in arguments], "input": os.devnull}
        print(json.dumps({**request, **{name: str(file) for name, file in files.items()}}), file=self.server.stdin)
        self.server.stdin.flush()
        code = int(self.answer())
        return subprocess.CompletedProcess(program, code, *(file.read_text() for file in files.values()))

    def answer(self) -> str:
        """The next line from the process."""
        try:
            line = self.server.stdout.readline()
        except BaseException:
            # A program that takes too long: its answer must not be taken for that of the next.
            self.kill()
            raise
        if not line:
            raise RuntimeError("the process that forks has ended: " + (self.folder / "log").read_text()[-9000:])
        return line

    def kill(self) -> None:
        """End the process and what it has started; they have nothing to take down."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()


@contextlib.contextmanager
def forking(start: str, folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Forked]:
    """A process that has executed ``start``, its imports above all.

    Args:
        start: Python code that must not start a thread.
        folder: where the output of the programs goes.
        env: environment of all of them, as for :mod:`subprocess`.
    """
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, start],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    with server:
        forked = Forked(server, folder)
        try:
            forked.answer()
            yield forked
        finally:
            forked.kill()
