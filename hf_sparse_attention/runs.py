"""What a training loop needs beside the model: a log of metrics, an ear for signals, files replaced as a whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator


def make_accelerator(**options: Any) -> Accelerator:
    """``Accelerator(**options)`` whose processes know of each other on a machine without an accelerator too.

    Otherwise each of them would there be the only one, and do all of the work.
    """
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)


class MetricsLog:
    """``metrics.jsonl`` and the trackers. A continued run drops the lines that it will write again.

    Args:
        accelerator: its main process writes; its trackers are told too.
        path: of ``metrics.jsonl``.
        step: finished steps; later lines of an interrupted run are removed.
        pending: losses of the steps since the last line, from :attr:`pending` of the interrupted run.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, step: int = 0, pending: list[float] | None = None
    ) -> None:
        self.accelerator = accelerator
        self.path = path
        self.pending = list(pending or [])
        self._tokens, self._seconds = 0, 0.0
        if accelerator.is_main_process:
            drop_later_lines(path, step)

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        """Note one optimizer step."""
        self.pending.append(loss)
        self._tokens += tokens
        self._seconds += seconds

    def summary(self) -> str:
        """For a progress bar."""
        speed = self._tokens / self._seconds
        return f"loss {self.pending[-1]:.3f}, {speed:,.0f} tokens/s, {memory_gb(self.accelerator.device):.1f} GB"

    def write(self, step: int, **values: float | None) -> None:
        """A line with the mean loss since the last one, speed, memory, and ``values`` that are not None."""
        line = {
            "loss": sum(self.pending) / len(self.pending),
            **{name: value for name, value in values.items() if value is not None},
            "tokens_per_second": round(self._tokens / self._seconds, 1),
            "memory_gb": round(memory_gb(self.accelerator.device), 3),
        }
        self.pending, self._tokens, self._seconds = [], 0, 0.0
        self.append(step, line)

    def append(self, step: int, values: dict[str, float]) -> None:
        """A line with these values alone."""
        if self.accelerator.is_main_process:
            with _naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(values, step=step)


def drop_later_lines(path: Path, step: int) -> None:
    """Remove the lines of ``metrics.jsonl`` after ``step``, and one that was cut short when the process was killed."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        with _naming(path):
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The error of a full disk does not name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error})") from error


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def memory_gb(device: torch.device) -> float:
    """Peak memory of the GPU; on the CPU, what the process holds. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


class StopSignals:
    """Turns SIGTERM and SIGINT into a question asked after each step; a second Ctrl-C stops at once.

    Attributes:
        number: the signal received, None before.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def received(self) -> bool:
        """Whether any process has got one: all of them must leave after the same step."""
        if self.accelerator.num_processes == 1:
            return self.number is not None  # asking the others would wait for the device
        if self.number is not None:
            self.accelerator.set_trigger()
        if not self.accelerator.check_trigger():
            return False
        self.number = self.number or signal.SIGTERM
        return True


@contextmanager
def leaving_on_signals(program: str) -> Iterator[None]:
    """In here the first SIGTERM or SIGINT leaves as an error does, by ``finally``; the exit code is 128 + its number.

    For programs that start others: without it, SIGTERM would leave these running.
    """

    def leave(number: int, frame: Any) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        print(f"{program}: stopped by a signal; the same command goes on", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in previous:
            signal.signal(number, leave)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def replace_files(folder: Path, write: Callable[[Path], Any]) -> list[str]:
    """Let ``write`` fill a temporary folder, then move its files into ``folder``, so that none is ever half there.

    Returns:
        The file names.

    Raises:
        OSError: something could not be written; ``folder`` holds what it held before.
    """
    temporary = folder / ".files.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write(temporary)
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            os.replace(temporary / name, folder / name)
        return names
    except Exception as error:  # safetensors and tokenizers have error types of their own
        raise OSError(f"{folder}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
