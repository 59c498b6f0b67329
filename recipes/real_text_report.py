"""One table and the pictures of several runs of real_text.yaml that perplexity.py and needle.py have measured.

    python recipes/real_text_report.py --runs outputs/real_text --output_dir model_cards/results/real_text

Each run is a folder VARIANT_sSEED with metrics.jsonl and options.json of its training, and below it any folders with a
perplexity.json, needle.json or analysis.json. Writes real_text.json, real_text.md, perplexity.png and needles.png.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.evaluation.plots import plot_needles, plot_perplexity
from hf_sparse_attention.evaluation.report import format_number, format_table, write_json
from hf_sparse_attention.runs import replace_files

_LABEL = re.compile(r"(?P<variant>.+)_s(?P<seed>\d+)(?P<scaling>\+\w+)?")


@dataclass
class ReportArguments:
    runs: str = field(metadata={"help": "Folder of the runs, each in a folder VARIANT_sSEED."})
    output_dir: str = field(metadata={"help": "Folder for JSON, tables and pictures."})
    reference: str = field(
        default="softmax_rope", metadata={"help": "Variant whose loss at the training length is compared with."}
    )
    pictured: list[str] | None = field(
        default=None, metadata={"help": "Variants in the pictures, in this order; default: all."}
    )


@dataclass
class Measured:
    """What was measured of one checkpoint, read in one way (a RoPE scaling is another way)."""

    by_length: dict[int, dict[str, float]]
    by_position: list[dict[str, float]]
    # task, then length, to one number per depth
    needles: dict[str, dict[int, list[float]]]


def main() -> None:
    (args,) = parse_arguments(ReportArguments, description=__doc__.splitlines()[0])
    try:
        write_report(args)
    except (OSError, ValueError) as error:
        sys.exit(f"real_text_report.py: error: {error}")
    except (KeyError, TypeError) as error:
        sys.exit(f"real_text_report.py: error: a result file of {args.runs} is not complete ({error!r})")


def write_report(args: ReportArguments) -> None:
    folders = sorted(path for path in Path(args.runs).iterdir() if path.is_dir() and _LABEL.fullmatch(path.name))
    runs = {folder.name: read_run(folder) for folder in folders}
    runs = {name: run for name, run in runs.items() if run["perplexity"]}
    if not runs:
        raise ValueError(f"{args.runs} holds no folder VARIANT_sSEED with a perplexity.json")
    check_comparable(runs)
    table = all_tables(runs, args.reference)
    variants = group_by_variant(runs)
    if unknown := sorted(set(args.pictured or ()) - set(variants)):
        raise ValueError(f"pictured: {', '.join(unknown)} not among {', '.join(variants)}")
    first = next(iter(runs.values()))["perplexity"]
    shown = {variant: seeds[min(seeds)] for variant, seeds in variants.items()}
    train_length = first["protocol"]["train_length"]

    def write(temporary: Path) -> None:
        write_json(temporary / "real_text.json", {"reference": args.reference, "runs": runs})
        (temporary / "real_text.md").write_text(table + "\n", encoding="utf-8")
        curves = {
            variant: {"by_length": measured.by_length, "by_position": measured.by_position}
            for variant, measured in ((name, shown[name]) for name in args.pictured or shown)
        }
        plot_perplexity(temporary / "perplexity.png", curves, train_length, first["unigram_perplexity"])
        pictured = [variant for variant in args.pictured or shown if shown[variant].needles]
        if pictured:
            lengths = sorted(
                {length for name in pictured for found in shown[name].needles.values() for length in found}
            )
            tasks = list(dict.fromkeys(task for name in pictured for task in shown[name].needles))
            depths = needle_depths(runs)
            grids = {name: heat_maps(shown[name], tasks, lengths, len(depths)) for name in pictured}
            plot_needles(temporary / "needles.png", grids, lengths, depths, train_length)

    written = replace_files(Path(args.output_dir), write)
    print(f"{table}\n\nWritten to {args.output_dir}: {', '.join(written)}")


def all_tables(runs: dict[str, dict[str, Any]], reference: str) -> str:
    """What real_text.md holds, from what real_text.json holds."""
    variants, protocol = group_by_variant(runs), next(iter(runs.values()))["perplexity"]["protocol"]
    perplexity, training = perplexity_table(variants, protocol, reference), training_table(runs)
    return "\n\n".join([perplexity, *needle_tables(variants, protocol), training])


def read_run(folder: Path) -> dict[str, Any]:
    """Training and measurements of one run, as far as they are there."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    # A run that was killed may have cut its last one.
    lines = [json.loads(line) for line in lines if "tokens_per_second" in line and line.endswith("}")]
    training = None
    if lines:
        late = lines[len(lines) // 2 :]
        training = {
            "steps": lines[-1]["step"],
            "tokens": lines[-1]["tokens"],
            "loss": lines[-1]["loss"],
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in late),
            "memory_gb": lines[-1]["memory_gb"],
            "options": read_json(folder / "options.json"),
            "curve": [[line["step"], line["loss"]] for line in lines],
        }
    found = {name: sorted(folder.glob(f"*/{name}.json")) for name in ("perplexity", "needle", "analysis")}
    read = {name: [read_json(file) for file in files] for name, files in found.items()}
    return {
        "training": training,
        "perplexity": read["perplexity"][0] if read["perplexity"] else None,
        "needle": read["needle"],
        "analysis": read["analysis"][0] if read["analysis"] else None,
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def check_comparable(runs: dict[str, dict[str, Any]]) -> None:
    """Refuse runs that a table cannot hold side by side: measured otherwise, or under another name."""
    wanted = ("train_length", "lengths", "target_tokens", "windows", "documents")
    first, reference = next((name, run["perplexity"]["protocol"]) for name, run in runs.items())
    depths = {tuple(part["protocol"]["depths"]): name for name, run in runs.items() for part in run["needle"]}
    if len(depths) > 1:
        raise ValueError(f"needle.json: {' and '.join(depths.values())} were measured at different depths")
    for name, run in runs.items():
        for field_name in wanted:
            values = [protocol[field_name] for protocol in (run["perplexity"]["protocol"], reference)]
            if values[0] != values[1]:
                raise ValueError(f"perplexity.json: {name} has {field_name} {values[0]}, {first} has {values[1]}")
        for label in run["perplexity"]["checkpoints"]:
            if label.partition("+")[0] != name:
                raise ValueError(
                    f"perplexity.json of {name} measures {label!r}; the checkpoint must be called {name} there"
                )


def group_by_variant(runs: dict[str, dict[str, Any]]) -> dict[str, dict[int, Measured]]:
    """Variant (with its RoPE scaling) to seed to measurements."""
    variants: dict[str, dict[int, Measured]] = defaultdict(dict)
    for run in runs.values():
        for label, result in run["perplexity"]["checkpoints"].items():
            match = _LABEL.fullmatch(label)
            needles: dict[str, dict[int, list[float]]] = defaultdict(dict)
            for part in run["needle"]:
                for task, grid in part["checkpoints"].get(label, {"recall": {}})["recall"].items():
                    for length, column in zip(part["protocol"]["lengths"], zip(*grid), strict=True):
                        needles[task][length] = list(column)
            by_length = {int(length): values for length, values in result["by_length"].items()}
            name = match["variant"] + (match["scaling"] or "")
            variants[name][int(match["seed"])] = Measured(by_length, result["by_position"], dict(needles))
    return dict(variants)


def perplexity_table(variants: dict[str, dict[int, Measured]], protocol: dict[str, Any], reference: str) -> str:
    lengths, base = protocol["lengths"], protocol["train_length"]
    header = ["perplexity", "seeds", *(f"{n} ({n / base:g}x)" for n in lengths), f"loss at 1x vs {reference}"]
    rows = []
    for variant, seeds in variants.items():
        cells = []
        for length in lengths:
            found = [measured.by_length[length] for measured in seeds.values()]
            value = format_number(statistics.mean(cell["perplexity"] for cell in found))
            if len(found) == 1:
                low, high = (format_number(found[0][key]) for key in ("low", "high"))
                cells.append(f"{value} [{low}, {high}]")
            else:
                low, high = (format_number(pick(cell["perplexity"] for cell in found)) for pick in (min, max))
                cells.append(f"{value} ({low} to {high})")
        rows.append([variant, str(len(seeds)), *cells, relative_loss(seeds, variants.get(reference), base)])
    note = (
        f"Same {protocol['windows']} x {protocol['target_tokens']} target tokens of {protocol['documents']} documents "
        f"at every length. In brackets, with one seed: {protocol['interval']}; with more: smallest to largest."
    )
    return f"{format_table(header, rows)}\n\n{note}"


def relative_loss(seeds: dict[int, Measured], reference: dict[int, Measured] | None, base: int) -> str:
    """Difference of the mean loss over the seeds that both have."""
    common = sorted(seeds.keys() & reference.keys()) if reference else []
    if not common or base not in next(iter(seeds.values())).by_length:
        return ""
    own, other = (
        statistics.mean(group[seed].by_length[base]["loss"] for seed in common) for group in (seeds, reference)
    )
    return f"{own / other - 1:+.2%}"


def needle_tables(variants: dict[str, dict[int, Measured]], protocol: dict[str, Any]) -> list[str]:
    """A table per task: share found over all depths, by length."""
    tasks = list(dict.fromkeys(task for seeds in variants.values() for one in seeds.values() for task in one.needles))
    tables = []
    for task in tasks:
        lengths = sorted(
            {n for seeds in variants.values() for one in seeds.values() for n in one.needles.get(task, {})}
        )
        rows = []
        for variant, seeds in variants.items():
            cells = []
            for length in lengths:
                found = [
                    statistics.mean(one.needles[task][length])
                    for one in seeds.values()
                    if length in one.needles.get(task, {})
                ]
                cells.append(f"{statistics.mean(found):.0%}" if found else "")
            rows.append([variant, *cells])
        header = [f"{task} found", *(f"{n} ({n / protocol['train_length']:g}x)" for n in lengths)]
        tables.append(format_table(header, rows))
    return tables


def training_table(runs: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, run in runs.items():
        if training := run["training"]:
            numbers = (training["steps"], training["tokens"], round(training["tokens_per_second"]))
            rate = f"{training['options']['learning_rate']:g}"
            rows.append(
                [name, *(f"{n:,}" for n in numbers), f"{training['memory_gb']:.1f}", rate, f"{training['loss']:.3f}"]
            )
    return format_table(["run", "steps", "tokens", "tokens/s", "GB", "learning rate", "last training loss"], rows)


def heat_maps(
    measured: Measured, tasks: Sequence[str], lengths: Sequence[int], depths: int
) -> dict[str, list[list[float]]]:
    """Task to one row per depth, one column per length; NaN, which is left white, where nothing was measured."""
    blank = [math.nan] * depths
    return {
        task: [list(row) for row in zip(*(measured.needles.get(task, {}).get(n, blank) for n in lengths), strict=True)]
        for task in tasks
    }


def needle_depths(runs: dict[str, dict[str, Any]]) -> Sequence[float]:
    return next(part["protocol"]["depths"] for run in runs.values() for part in run["needle"])


if __name__ == "__main__":
    main()
