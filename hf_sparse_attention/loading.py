"""Loading errors that name the broken file or weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@contextmanager
def naming_broken_files(path: str | Path) -> Iterator[None]:
    """Around ``from_pretrained(path)``: errors that do not say what is broken are raised as OSError that does.

    Args:
        path: a checkpoint folder, whose files are looked through after an error, or a Hub name.

    Raises:
        OSError: weights or their index cannot be read, or do not fit the config.
    """
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, RuntimeError) as error:
        raise OSError("; ".join(_broken_files(Path(path))) or f"{path}: {error}") from error


def _broken_files(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            yield f"{file} is not valid JSON ({error})"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            yield f"{file} is cut short or damaged ({error})"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained(path)``.

    Raises:
        OSError: naming ``path``, and the file in it that is broken.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # each library beneath has types of its own
        reason = "; ".join(_broken_files(Path(path))) or " ".join(str(error).split())
        raise OSError(f"no usable tokenizer in {path}: {reason}") from error


def check_finite(model: nn.Module, path: str | Path) -> None:
    """Refuse weights that are NaN or infinite, which would spread to every output.

    Args:
        model: loaded from ``path``; weights on the meta device are not there to be checked.

    Raises:
        OSError: naming the first such weight.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not parameter.isfinite().all():
            raise OSError(f"{path}: the weight {name} holds NaN or infinite values")
