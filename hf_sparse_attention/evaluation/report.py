"""What the evaluation recipes write: the record of a run, JSON files and tables."""

from __future__ import annotations

import json
import math
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import hf_sparse_attention

# A list of numbers as json.dumps spreads it; a newline is never inside a string of JSON.
_NUMBERS = re.compile(r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]")


def run_record(settings: dict[str, Any], device: torch.device, processes: int) -> dict[str, Any]:
    """Everything needed to repeat a run: command, all settings (seeds among them), versions, machine."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "settings": settings,
        "versions": {
            "hf_sparse_attention": hf_sparse_attention.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON, a list of numbers on one line; an undefined or infinite number is null: JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in cells[1:])])


def format_number(value: float) -> str:
    """Four significant digits; large values in short form."""
    return f"{value:.4g}" if value < 1e5 else f"{value:.1e}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
