"""Where a model that copies or reverses errs: wrong tokens by how many symbols before them stand elsewhere too.

    python recipes/synthetic_errors.py --model model_cards/synthetic/copy --task copy --length 1024 --rows 64

A token is ambiguous to n symbols if the n symbols before it also stand before another symbol of its target. Prints a
table and writes errors.json.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hf_sparse_attention  # noqa: F401 - registers the presets
from hf_sparse_attention.arguments import ArgumentError, parse_arguments
from hf_sparse_attention.data.synthetic import make_task
from hf_sparse_attention.evaluation.report import format_table, run_record, write_json
from hf_sparse_attention.evaluation.synthetic_errors import errors_by_context

TASKS = ("copy", "reverse")


@dataclass
class ErrorOptions:
    model: str | None = field(default=None, metadata={"help": "Folder or name of a model of synthetic.py."})
    task: str = field(default="copy", metadata={"help": "copy or reverse."})
    length: int = field(default=256, metadata={"help": "Source tokens of a row."})
    rows: int = field(default=64, metadata={"help": "Rows."})
    seed: int = field(default=1, metadata={"help": "Of the rows; those that synthetic.py measures have 1."})
    output: str = field(default="outputs/synthetic_errors/errors.json", metadata={"help": "Results file."})

    def __post_init__(self) -> None:
        if self.model is None:
            raise ArgumentError("model is missing: a folder or name of a model of synthetic.py")
        if self.task not in TASKS:
            raise ArgumentError(f"task is {self.task!r}; allowed: {', '.join(TASKS)}")
        for name in ("length", "rows"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; allowed: at least 1")


def main(argv: list[str] | None = None) -> None:
    (options,) = parse_arguments(ErrorOptions, argv=argv, description=__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = make_task(options.task)
    try:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device).eval()
    except (OSError, ValueError) as error:
        sys.exit(f"synthetic_errors.py: error: model: {options.model} cannot be loaded: {error}")
    if model.config.vocab_size != task.vocab_size:
        sys.exit(
            f"synthetic_errors.py: error: model: {options.model} has {model.config.vocab_size} tokens, "
            f"{options.task} has {task.vocab_size}"
        )
    counts, right = errors_by_context(model, task, options.length, options.rows, options.seed)
    rows = [[str(context), f"{c.tokens:,}", str(c.wrong), str(c.followed)] for context, c in counts.items()]
    print(f"{right} of {options.rows} rows of {options.length} tokens are right.\n")
    print(format_table(["ambiguous to", "tokens", "wrong", "wrong by following another place"], rows))
    results = {
        "right_rows": right,
        "contexts": {str(context): dataclasses.asdict(count) for context, count in counts.items()},
        "run": run_record(dataclasses.asdict(options), device, 1),
    }
    try:
        write_json(Path(options.output), results)
    except OSError as error:
        sys.exit(f"synthetic_errors.py: error: {options.output}: could not be written ({error})")


if __name__ == "__main__":
    main()
