"""Measures one contestant on the CPU in a process of its own, so that its memory peak is its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 2**20


@dataclass(frozen=True)
class Problem:
    """One set of inputs: sizes, and what is computed from them."""

    length: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    alpha: float
    causal: bool
    score_std: float
    dense_heads: int
    threads: int
    seed: int


class Worker:
    """A process that holds one contestant and its inputs, and measures when asked to."""

    def __init__(self, name: str, problem: Problem) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, asdict(problem)), daemon=True)
        self._process.start()
        other.close()

    def measure(self) -> dict[str, Any]:
        """Seconds and MiB of one forward and backward, and the last rows of the output.

        Raises:
            RuntimeError: the process ended or the contestant failed; the message says how.
        """
        try:
            self._pipe.send("measure")
            kind, result = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join()
            raise RuntimeError(f"{self.name}: the process ended with code {self._process.exitcode}") from error
        if kind == "error":
            raise RuntimeError(f"{self.name}: {result}")
        return result

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._pipe.send("stop")
        self._process.join()


def median(measurements: list[dict[str, Any]], key: str) -> float:
    return statistics.median(measurement[key] for measurement in measurements)


def _serve(pipe: Any, name: str, fields: dict[str, Any]) -> None:
    from attention_contestants import CONTESTANTS

    problem = Problem(**fields)
    torch.set_num_threads(problem.threads)
    inputs = _inputs(problem)
    # The libraries that a first call loads are not part of the measurement.
    small = [tensor[:, :1, :16].detach().requires_grad_() for tensor in inputs[:3]]
    _measure(CONTESTANTS[name], small, inputs[3][:, :1, :16], problem)
    while pipe.recv() == "measure":
        try:
            pipe.send(("result", _measure(CONTESTANTS[name], inputs[:3], inputs[3], problem)))
        except (RuntimeError, MemoryError) as error:
            pipe.send(("error", f"{type(error).__name__}: {error}"))


def _inputs(problem: Problem) -> list[Tensor]:
    """Query, key, value and the gradient of the output; scores have the standard deviation ``score_std``."""
    generator = torch.Generator().manual_seed(problem.seed)
    shape = (problem.batch, problem.heads, problem.length, problem.head_dim)
    dtype = getattr(torch, problem.dtype)
    tensors = [torch.randn(shape, generator=generator) for _ in range(4)]
    tensors[0] *= problem.score_std
    return [tensor.to(dtype) for tensor in tensors]


def _measure(contestant: Any, inputs: list[Tensor], grad: Tensor, problem: Problem) -> dict[str, Any]:
    heads = inputs[0].shape[1]
    at_once = min(problem.dense_heads, heads) if contestant.quadratic else heads
    memory = _Memory()
    seconds = {"forward_s": 0.0, "backward_s": 0.0, "cpu_s": 0.0}
    outputs, gradients = [], []
    for first in range(0, heads, at_once):
        part = slice(first, first + at_once)
        leaves = [tensor[:, part].detach().requires_grad_() for tensor in inputs]
        start, cpu_start = time.perf_counter(), time.process_time()
        output = contestant.attend(*leaves, problem.alpha, problem.causal)
        middle = time.perf_counter()
        gradients.append(torch.autograd.grad(output, leaves, grad[:, part]))
        end, cpu_end = time.perf_counter(), time.process_time()
        seconds["forward_s"] += middle - start
        seconds["backward_s"] += end - middle
        seconds["cpu_s"] += cpu_end - cpu_start
        outputs.append(output.detach())
    sample = torch.cat(outputs, dim=1)[:, :, -4:].float().cpu()
    return {**seconds, "extra_mib": memory.peak_mib(), "heads_at_once": at_once, "sample": sample.numpy()}


class _Memory:
    """The most memory that was in use at a time since this object was made, above what was in use then."""

    def __init__(self) -> None:
        # Linux: the peak starts again from the present size; where that is refused, it includes start-up.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS", fallback=_resident_peak())

    def peak_mib(self) -> float:
        return (_status("VmHWM", fallback=_resident_peak()) - self._before) / MIB


def _status(name: str, fallback: int) -> int:
    """A size in bytes of the process from the Linux process table."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return fallback


def _resident_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
