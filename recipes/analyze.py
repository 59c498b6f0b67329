"""What attention does in one or several checkpoints, per layer and head: supports, entropies, zeros, length scales.

    accelerate launch recipes/analyze.py recipes/configs/eval/analyze.yaml --models a=out/a b=out/b
    python recipes/analyze.py --experiments --output_dir outputs/experiments

Writes analysis.json, analysis.md and the pictures analysis.png, length_scale.png and attention.png into output_dir;
with --experiments also experiments.json, experiments.md and experiments.png, which need no checkpoint.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from hf_sparse_attention import PRESETS, convert
from hf_sparse_attention.analysis import analyze, attention_map, by_head_type
from hf_sparse_attention.analysis.experiments import run_experiments
from hf_sparse_attention.analysis.plots import (
    plot_against_length,
    plot_attention_maps,
    plot_experiments,
    plot_length_scales,
)
from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.checkpoints import locked_folder
from hf_sparse_attention.data import DataError, iterate_texts, load_documents
from hf_sparse_attention.evaluation.checkpoints import (
    DTYPES,
    CheckpointError,
    describe_model,
    load_model,
    load_tokenizer,
    parse_specs,
    training_length,
)
from hf_sparse_attention.evaluation.report import format_number, format_table, run_record, write_json
from hf_sparse_attention.runs import make_accelerator, replace_files


@dataclass
class AnalyzeArguments:
    models: list[str] | None = field(
        default=None, metadata={"help": "Checkpoints as name=path or path: folders, or models of the Hub."}
    )
    data: list[str] | None = field(
        default=None,
        metadata={"help": "Text: .txt, .jsonl, .parquet (also .xz, .gz) files, or one data set of the Hub."},
    )
    output_dir: str = field(default="outputs/analyze", metadata={"help": "Folder for JSON, tables and pictures."})
    max_length: int = field(
        default=1024,
        metadata={
            "help": "Cut documents to so many tokens; memory: about 100 bytes times its square times a layer's heads."
        },
    )
    min_length: int | None = field(
        default=None, metadata={"help": "Leave out documents of fewer tokens; default: max_length, all of one length."}
    )
    max_documents: int = field(
        default=8, metadata={"help": "Analyse the first so many documents that are long enough."}
    )
    train_length: int | None = field(
        default=None, metadata={"help": "Marked in the pictures; default: max_position_embeddings of the models."}
    )
    map_layer: int = field(default=-1, metadata={"help": "Layer of the attention map, from 0, or from -1 backwards."})
    map_head: int = field(
        default=-1, metadata={"help": "Head of the attention map; the last one has no ALiBi under NAPE."}
    )
    map_tokens: int = field(default=96, metadata={"help": "The map shows the first so many tokens of a document."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer of all models; default: each model's own, saved with it."}
    )
    text_field: str = field(default="text", metadata={"help": "Field of the records that holds the text."})
    split: str = field(default="validation", metadata={"help": "Split of a data set of the Hub."})
    subset: str | None = field(default=None, metadata={"help": "Configuration of a data set of the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "float32, bfloat16, float16 or auto (as saved); half precisions round small weights to 0."},
    )
    experiments: bool = field(default=False, metadata={"help": "Measure the paper's claims about sparse attention."})
    entropy_lengths: list[int] = field(
        default_factory=lambda: [2**i for i in range(3, 18)],
        metadata={"help": "Experiments: numbers of logits of the entropy curves."},
    )
    early_token_lengths: list[int] = field(
        default_factory=lambda: [2**i for i in range(4, 13)],
        metadata={"help": "Experiments: lengths of the sequences that differ in one early token."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the experiments; nothing else is random."})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}.")
        for name, least in (("max_length", 2), ("map_tokens", 2), ("max_documents", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least {least}.")
        if self.train_length is not None and self.train_length < 1:
            raise ValueError(f"train_length is {self.train_length}; allowed: at least 1.")
        if self.min_length is not None and not 2 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length is {self.min_length}; allowed: 2 to max_length ({self.max_length}).")
        for name, least in (("entropy_lengths", 8), ("early_token_lengths", 3)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"{name} are {getattr(self, name)}; allowed: at least {least} each.")


def main() -> None:
    (args,) = parse_arguments(AnalyzeArguments, description=__doc__)
    accelerator = make_accelerator()
    try:
        if accelerator.num_processes > 1:
            raise ValueError(f"num_processes is {accelerator.num_processes}; it runs in one process.")
        if not args.models and not args.experiments:
            raise ValueError("models: give at least one checkpoint, or --experiments, which needs none.")
        if args.models and not args.data:
            raise ValueError("data: the models need a text to read.")
        with locked_folder(args.output_dir):
            if args.models:
                analyze_checkpoints(args, accelerator)
            if args.experiments:
                experiment(args, accelerator)
    except (CheckpointError, DataError, OSError, ValueError) as error:
        sys.exit(f"analyze.py: error: {error}")
    accelerator.end_training()


def analyze_checkpoints(args: AnalyzeArguments, accelerator: Accelerator) -> None:
    specs = parse_specs(args.models)
    train_length = args.train_length or training_length(specs)
    texts = load_documents(args.data, text_field=args.text_field, split=args.split, subset=args.subset)
    results, maps = {}, {}
    for spec in specs:
        tokenizer = load_tokenizer(spec, args.tokenizer)
        documents = read_documents(args, texts, tokenizer)
        model = load_model(
            spec,
            tokenizer,
            train_length=train_length,
            max_length=args.max_length,
            dtype=args.dtype,
            device=accelerator.device,
        )
        description = describe_model(model)
        if description["attention"] not in PRESETS:
            # The same numbers, from an operator that can return its weights for every family.
            convert(model, "softmax")
        print(f"{spec.label}: {len(documents)} documents, {sum(map(len, documents))} tokens")
        results[spec.label] = {
            "path": spec.path,
            **description,
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            **analyze(model, documents).to_dict(),
        }
        title = f"{spec.label}, layer {args.map_layer}, head {args.map_head}"
        maps[title] = attention_map(model, documents[0][: args.map_tokens], args.map_layer, args.map_head)
        del model

    folder = Path(args.output_dir)
    table = summarize(results)
    record = run_record(dataclasses.asdict(args), accelerator.device, accelerator.num_processes)

    def write(temporary: Path) -> None:
        write_json(temporary / "analysis.json", {"train_length": train_length, "checkpoints": results, "run": record})
        (temporary / "analysis.md").write_text(table + "\n", encoding="utf-8")
        plot_against_length(temporary / "analysis.png", results, train_length)
        plot_attention_maps(temporary / "attention.png", maps)
        plot_length_scales(temporary / "length_scale.png", results)

    written = replace_files(folder, write)
    print(f"\n{table}\n\nWritten: {', '.join(str(folder / name) for name in written)}")


def read_documents(
    args: AnalyzeArguments, texts: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The first documents that are long enough, cut; with the special tokens that the tokenizer adds itself."""
    least = args.max_length if args.min_length is None else args.min_length
    documents = []
    longest = 0
    for text in iterate_texts(texts):
        # A list of one: long texts are meant, so no warning about their length.
        ids = tokenizer(text, verbose=False)["input_ids"][: args.max_length]
        longest = max(longest, len(ids))
        if len(ids) >= least:
            documents.append(ids)
        if len(documents) == args.max_documents:
            break
    if not documents:
        raise DataError(
            f"data: no document has {least} tokens, the longest has {longest}; "
            "give a smaller max_length, or min_length for documents of different lengths."
        )
    return documents


def summarize(results: dict) -> str:
    """Median over heads of support, entropy and zeros at growing n, by checkpoint and type of head."""
    tables = []
    ranges = max((result["ranges"] for result in results.values()), key=len)
    for measure, title in (
        ("support", "support size"),
        ("entropy", "normalised entropy"),
        ("zeros", "share of zeros"),
        ("scale", "scale t"),
    ):
        header = [f"{title}, n =", "2", *(f"{bounds['first']}-{bounds['last']}" for bounds in ranges[1:])]
        rows = []
        for name, result in results.items():
            for kind, curve in by_head_type(result, measure).items():
                cells = [format_number(value) for value in curve["median"]]
                rows.append([f"{name}, {kind} heads", *cells, *[""] * (len(ranges) - len(cells))])
        tables.append(format_table(header, rows))
    return "\n\n".join([*tables, "Medians over the heads of all layers, each head's number a mean over queries."])


def experiment(args: AnalyzeArguments, accelerator: Accelerator) -> None:
    content = run_experiments(args.entropy_lengths, args.early_token_lengths, args.seed)
    folder = Path(args.output_dir)
    record = run_record(dataclasses.asdict(args), accelerator.device, accelerator.num_processes)
    table = summarize_experiments(content)

    def write(temporary: Path) -> None:
        write_json(temporary / "experiments.json", {**content, "run": record})
        (temporary / "experiments.md").write_text(table + "\n", encoding="utf-8")
        plot_experiments(temporary / "experiments.png", content)

    written = replace_files(folder, write)
    print(f"\n{table}\n\nWritten: {', '.join(str(folder / name) for name in written)}")


def summarize_experiments(content: dict) -> str:
    dispersion, outside, early = content["dispersion"], content["irrelevant_tokens"], content["early_token"]
    tables = []
    for kind, title in (("uniform", "uniform logits"), ("needles", "four needles")):
        header = [f"H / log n, {title}, n =", *map(str, dispersion["lengths"])]
        rows = [[name, *(f"{h:.2f}" for h in curve["entropy"])] for name, curve in dispersion[kind].items()]
        tables.append(format_table(header, rows))
    changes = next(iter(next(iter(outside["entmax"].values())).values()))
    rows = [
        [f"{name}, {backend}, {dtype}", *(_cell(change, found[change]) for change in changes)]
        for name in ("entmax", "softmax")
        for backend, by_dtype in outside[name].items()
        for dtype, found in by_dtype.items()
    ]
    tables.append(format_table(["tokens outside the support", *changes], rows))
    for gap, curves in early["distance"].items():
        header = [f"distance, score {gap} above the others, length", *map(str, early["lengths"])]
        tables.append(format_table(header, [[name, *(f"{d:.3g}" for d in c)] for name, c in curves.items()]))
    copies = content["copies"]
    header = [f"kinds kept of {copies['kinds']} (weight moved), copies of each", *map(str, copies["numbers"])]
    cells = {
        name: [f"{kept:.1f} ({moved:.0%})" for kept, moved in zip(curve["kept"], curve["moved"], strict=True)]
        for name, curve in copies["curves"].items()
    }
    tables.append(format_table(header, [[name, *row] for name, row in cells.items()]))
    return "\n\n".join(tables)


def _cell(change: str, found: dict) -> str:
    if found["bit_equal"]:
        return "0" if change == "gradient" else "bit-equal"
    return f"{found['difference']:.1e}"


if __name__ == "__main__":
    main()
