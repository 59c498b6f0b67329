"""What the synthetic recipes show: lines, model cards, the table in the paper's form, the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from synthetic_options import TaskOptions, TrainOptions
from transformers import PreTrainedConfig

from hf_sparse_attention.checkpoints import CheckpointError
from hf_sparse_attention.evaluation.plots import figure_grid, save_figure
from hf_sparse_attention.evaluation.report import format_table, write_json
from hf_sparse_attention.evaluation.synthetic import Cell
from hf_sparse_attention.modelcard import TEMPLATE, Measurement, create_model_card
from hf_sparse_attention.runs import replace_files

CARD_TEMPLATE = TEMPLATE.with_name("synthetic_card_template.md")
_ENCODINGS = {"model": "RoPE", "nape": "NAPE", "alibi": "ALiBi", "nope": "NoPE"}
_DEFAULTS = {option.name: option.default for option in (*fields(TaskOptions), *fields(TrainOptions))}
# Runs that differ in these alone are seeds of the same training.
_NOT_COMPARED = {
    "output_dir", "seed", "resume", "logging_steps", "save_steps", "cuda_graph", "compile", "validation_steps",
    "validation_samples",
}  # fmt: skip
_COMPARED = [name for name in _DEFAULTS if name not in _NOT_COMPARED]
# Options of TrainOptions that a card has under a name of its own.
_IN_CARD = {
    "batch_size", "max_steps", "max_seconds", "learning_rate", "warmup_steps", "mixed_precision", "train_lengths",
    "validation_multiple",
}  # fmt: skip
_NAMES = {"asentmax": "ASEntmax", "entmax": "Entmax", "ssmax": "SSMax", "softmax": "Softmax", "topk": "Top-k"}


def describe_cell(cell: Cell, longest: int) -> str:
    """One line about a measured length."""
    generated = f", {cell.generated_agree} of {cell.generated} generated agree" if cell.generated else ""
    return (
        f"{cell.length:,} ({cell.length / longest:g}x): exact {cell.exact_match:.1%} "
        f"[{cell.low:.1%}, {cell.high:.1%}] of {cell.samples}, tokens {cell.token_accuracy:.2%}{generated}, "
        f"{cell.seconds:.1f} s"
    )


def variant_name(attention: Mapping[str, Any]) -> str:
    """Attention and positions, as the paper's tables have them."""
    return f"{_NAMES[attention['preset']]} ({_ENCODINGS[attention['position_encoding']]})"


def synthetic_card(config: PreTrainedConfig, results: Mapping[str, Any], output: Path) -> ModelCard:
    """The model card from results.json."""
    training, settings, versions = results["training"], results["run"]["settings"], results["run"]["versions"]
    return create_model_card(
        config,
        repo_id=str(output),
        parameters=results["parameters"],
        training_length=results["train_lengths"][1],
        language=None,
        template=CARD_TEMPLATE,
        results=[
            Measurement(
                "exact_match",
                cell["exact_match"],
                f"{results['task']}, source of {cell['length']} tokens, {cell['samples']} samples",
                "recipes/synthetic.py",
                hub_dataset=f"synthetic-{results['task']}-{cell['length']}",
            )
            for cell in results["evaluation"]["cells"]
        ],
        training={
            "task": results["task"],
            "task options": settings["train_task_options"] or settings["task_options"],
            **({"stages": settings["stages"]} if settings.get("stages") else {}),
            "source tokens": f"{results['train_lengths'][0]} to {results['train_lengths'][1]}",
            "samples": f"{training['samples']:,}",
            "steps": training["steps"],
            **_kept(training),
            "batch": settings["batch_size"],
            "seconds": training["seconds"],
            "learning rate": settings["learning_rate"],
            "warmup steps": settings["warmup_steps"],
            "mixed precision": settings["mixed_precision"],
            **_unusual(settings),
            "seed": settings["seed"],
            "device": results["run"]["device"],
            "command": f"`{results['run']['command']}`",
            **versions,
        },
    )


def _kept(training: Mapping[str, Any]) -> dict[str, str]:
    """Which weights these are, where not the last."""
    selection = training.get("selection")
    return {"weights": f"of step {selection['kept_step']}, best at {selection['length']} tokens"} if selection else {}


def _unusual(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of the training is not the default."""
    names = [option.name for option in fields(TrainOptions) if option.name not in _NOT_COMPARED | _IN_CARD]
    return {
        name.replace("_", " "): settings[name]
        for name in names
        if settings.get(name, _DEFAULTS[name]) != _DEFAULTS[name]
    }


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results.json of every run below ``folder``, with the name of its folder."""
    found = []
    for path in sorted(folder.glob("**/results.json")):
        try:
            results = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON ({error})") from error
        found.append({"name": path.parent.relative_to(folder).as_posix(), **results})
    return found


def by_variant(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Runs by task and then by variant; where runs of a variant were trained differently, their names say how.

    Where they differ in more than two settings, or in one that is a mapping, each goes by its folder.
    """
    same: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        same.setdefault((run["task"], variant_name(run["attention"])), []).append(run)
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for (task, variant), members in same.items():
        differing = [name for name in _COMPARED if len({repr(_setting(run, name)) for run in members}) > 1]
        values = [_setting(run, name) for run in members for name in differing]
        brief = len(differing) <= 2 and not any(isinstance(value, Mapping) for value in values)
        for run in members:
            details = [f"{name} {_setting(run, name)}" for name in differing] if brief else [run["name"]]
            name = ", ".join([variant, *details])
            grouped.setdefault(task, {}).setdefault(name, []).append(run)
    return grouped


def _setting(run: Mapping[str, Any], name: str) -> Any:
    """A setting of a run, the default of one that is newer than the run."""
    return run["run"]["settings"].get(name, _DEFAULTS[name])


def samples_seen(run: Mapping[str, Any]) -> int:
    """By the weights that are kept."""
    training = run["training"]
    kept = training.get("selection", {}).get("kept_step")
    return training["samples"] if kept is None else kept * run["run"]["settings"]["batch_size"]


def cells_of(run: Mapping[str, Any]) -> dict[float, Mapping[str, Any]]:
    """Measured cells by multiple of the training length."""
    longest = run["train_lengths"][1]
    return {cell["length"] / longest: cell for cell in run.get("evaluation", {}).get("cells", [])}


def exact_at(run: Mapping[str, Any], multiple: float) -> float | None:
    """Exact match at a multiple; 0 beyond a length where nothing was right, None where it was not measured."""
    if multiple in (cells := cells_of(run)):
        return cells[multiple]["exact_match"]
    reasons = run.get("evaluation", {}).get("not_measured", {})
    return 0.0 if reasons.get(str(round(multiple * run["train_lengths"][1]))) == "nothing right" else None


def make_table(variants: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Exact match in per cent of one task: a row per variant, a column per multiple of the training length."""
    multiples = sorted({multiple for runs in variants.values() for run in runs for multiple in cells_of(run)})
    rows = []
    for name, runs in variants.items():
        row = []
        for multiple in multiples:
            values = [value for run in runs if (value := exact_at(run, multiple)) is not None]
            row.append(" / ".join(f"{100 * value:.1f}" for value in values) or "-")
        samples = sum(map(samples_seen, runs)) / len(runs)
        failed = [run["status"] for run in runs if run["status"].startswith("stopped")]
        rows.append([name, str(len(runs)), f"{samples / 1e6:.2f}M", *row, "; ".join(failed)])
    header = ["exact match, %", "seeds", "samples seen", *(f"{multiple:g}x" for multiple in multiples), ""]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return format_table(header, rows)


def write_report(folder: Path) -> str:
    """Tables, one JSON of all runs, and the picture, from the runs below ``folder``; returns the tables."""
    runs = read_results(folder)
    grouped = by_variant(runs)
    text = "\n\n".join(f"### {task}\n\n{make_table(variants)}" for task, variants in grouped.items())

    def write(temporary: Path) -> None:
        (temporary / "synthetic.md").write_text(text + "\n", encoding="utf-8")
        write_json(temporary / "synthetic.json", {"runs": runs})
        if grouped:
            plot(temporary / "synthetic.png", grouped)

    replace_files(folder, write)
    return text


def plot(path: Path, grouped: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Exact match against the multiple of the training length above, the loss curves below; a column per task.

    A variant has one colour in all columns, or, where there are too many, one within each.
    """
    from matplotlib import colormaps

    palette = (*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2])
    names = list(dict.fromkeys(name for variants in grouped.values() for name in variants))
    legend = 0.13 * max(map(len, grouped.values()))
    figure, (above, below) = figure_grid(2, len(grouped), width=1.0 + 3.6 * len(grouped), height=6.0 + legend)
    for upper, lower, (task, variants) in zip(above, below, grouped.items()):
        order = names if len(names) <= len(palette) else list(variants)
        colours = {name: palette[order.index(name) % len(palette)] for name in variants}
        for name, runs in variants.items():
            for number, run in enumerate(runs):
                style = {"color": colours[name], "label": name if number == 0 else None}
                cells = cells_of(run)
                if cells:
                    upper.plot(
                        list(cells),
                        [100 * c["exact_match"] for c in cells.values()],
                        marker="o",
                        markersize=3,
                        **style,
                    )
                    bounds = ([100 * c[key] for c in cells.values()] for key in ("low", "high"))
                    upper.fill_between(list(cells), *bounds, color=colours[name], alpha=0.12, linewidth=0)
                curve = run["training"]["curve"]
                batch = run["run"]["settings"]["batch_size"]
                lower.plot([step * batch / 1e6 for step in curve["step"]], curve["loss"], linewidth=1, **style)
        upper.set_xscale("log", base=2)
        upper.xaxis.set_major_formatter("{x:g}x")
        upper.set_ylim(-3, 103)
        upper.set_title(task, fontsize=10)
        # Below the axes: lines cross all of them.
        upper.legend(frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        upper.set_xlabel("multiple of the training length", fontsize=8)
        lower.set_yscale("log")
        lower.set_xlabel("samples seen (millions)", fontsize=8)
        for axes in (upper, lower):
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=7)
    above[0].set_ylabel("exact match, %", fontsize=8)
    below[0].set_ylabel("training loss (nats per target token)", fontsize=8)
    save_figure(figure, path)
