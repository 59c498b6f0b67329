"""Programs in processes of their own that need not import everything again: forks of one that has done so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Answers each line, the arguments of a program, with its exit code; what it prints goes to the files that are named.
_SERVER = """
import json, os, sys
exec(sys.argv[1])
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
# Nothing needs to be taken down.
os._exit(0)
"""


class Forked:
    """Runs programs in forks of a process that has executed ``start``; see :func:`forking`."""

    def __init__(self, server: subprocess.Popen, folder: Path) -> None:
        self.server, self.folder, self.count = server, folder, 0

    def __call__(self, program: str, *arguments: Any) -> subprocess.CompletedProcess:
        """What ``python -c PROGRAM ARGUMENTS`` would give, with the names of ``start`` defined in the program."""
        self.count += 1
        files = {name: self.folder / f"{self.count}.{name}" for name in ("stdout", "stderr")}
        request = {"program": program, "arguments": [str(argument) for argument in arguments], "input": os.devnull}
        print(json.dumps({**request, **{name: str(file) for name, file in files.items()}}), file=self.server.stdin)
        self.server.stdin.flush()
        code = self.server.stdout.readline()
        if not code:
            raise RuntimeError("the process that forks has ended: " + (self.folder / "log").read_text()[-9000:])
        return subprocess.CompletedProcess(program, int(code), *(files[name].read_text() for name in files))


@contextmanager
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
        )
    with server:
        yield Forked(server, folder)
        server.stdin.close()
