"""Put what perplexity.py and needle.py have measured of a checkpoint into its model card.

    python recipes/update_card.py --model outputs/model --measured outputs/perplexity/perplexity.json

The card's results, table and metadata of the Hub, become those of the files; the rest of it stays.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from hf_sparse_attention.arguments import ArgumentError, parse_arguments
from hf_sparse_attention.modelcard import Measurement, replace_results


@dataclass
class CardArguments:
    model: str = field(metadata={"help": "Folder of the checkpoint, with its README.md."})
    measured: list[str] = field(metadata={"help": "perplexity.json and needle.json of any number of runs."})
    label: str | None = field(
        default=None, metadata={"help": "Name of the checkpoint in these files; default: the only one there."}
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "What readers pass to from_pretrained, if it is another than the card has."}
    )


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(CardArguments, argv=argv, description=__doc__.splitlines()[0])
    try:
        results = [result for path in args.measured for result in measurements(Path(path), args.label)]
        path = Path(args.model) / "README.md"
        if not path.is_file():
            raise ArgumentError(f"model: {args.model} has no README.md")
        card = replace_results(load_card(path), results, repo_id=args.repo_id)
        temporary = path.with_name(".README.md.tmp")
        card.save(temporary)
        temporary.replace(path)
    except (ArgumentError, OSError, ValueError) as error:
        sys.exit(f"update_card.py: error: {error}")
    print(f"{path} has {len(results)} results")


def load_card(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ArgumentError(f"model: {path} is not a model card ({' '.join(str(error).split())})") from error


def measurements(path: Path, label: str | None) -> list[Measurement]:
    """The numbers of one file.

    Raises:
        ArgumentError: it is missing, is of another kind, or does not have the checkpoint.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        protocol, checkpoints = content["protocol"], content["checkpoints"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"measured: {path} is not a perplexity.json or needle.json ({error!r})") from error
    if not checkpoints:
        raise ArgumentError(f"measured: {path} has no checkpoints")
    if label is None and len(checkpoints) > 1:
        raise ArgumentError(f"label: {path} has {', '.join(checkpoints)}; say which of them is the model")
    name = label or next(iter(checkpoints))
    if name not in checkpoints:
        raise ArgumentError(f"label: {path} has {', '.join(checkpoints)}, not {name}")
    found = checkpoints[name]
    try:
        if "by_length" in found:
            data = ", ".join(Path(source).name for source in content["run"]["settings"]["data"])
            return perplexities(found, protocol, data)
        if "recall_by_length" in found:
            return needles(found, protocol)
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"measured: {path} is not complete ({error!r})") from error
    raise ArgumentError(f"measured: {path} has neither perplexities nor needles of {name}")


def perplexities(found: dict[str, Any], protocol: dict[str, Any], data: str) -> list[Measurement]:
    for length, cell in found["by_length"].items():
        if cell["perplexity"] is None:
            raise ValueError(f"the perplexity at {length} tokens is infinite")
    return [
        Measurement(
            "perplexity",
            cell["perplexity"],
            f"{data}, {describe(int(length), protocol)}, {cell['tokens']:,} target tokens",
            "recipes/perplexity.py",
            hub_dataset=f"text-{length}",
        )
        for length, cell in found["by_length"].items()
    ]


def needles(found: dict[str, Any], protocol: dict[str, Any]) -> list[Measurement]:
    samples = protocol["samples_per_cell"] * len(protocol["depths"])
    return [
        Measurement(
            "accuracy",
            sum(column) / len(column),
            f"{task}, {describe(length, protocol)}, {samples} samples",
            "recipes/needle.py",
            hub_dataset=f"{task}-{length}",
        )
        for task, grid in found["recall"].items()
        for length, column in zip(protocol["lengths"], zip(*grid, strict=True), strict=True)
    ]


def describe(length: int, protocol: dict[str, Any]) -> str:
    return f"{length} tokens ({length / protocol['train_length']:g}x)"


if __name__ == "__main__":
    main()
