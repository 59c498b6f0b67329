"""Needles in a haystack (RULER) over depth and length, for one or several checkpoints side by side.

    accelerate launch recipes/needle.py recipes/configs/eval/needle.yaml --models a=out/a b=out/b
    python recipes/needle.py --models a=out/a b=out/b --tasks s_niah_1 mk_niah_1 --samples 20

Every sample has exactly the stated number of tokens, prompt and answer together. Writes needle.json, needle.md,
needle.png and the answers of each checkpoint into output_dir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

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
from hf_sparse_attention.evaluation.needle_tasks import TASKS, NeedleFormat, NeedleSource
from hf_sparse_attention.evaluation.needles import DECODINGS, NeedleAnswer, cached_samples, run_grid
from hf_sparse_attention.evaluation.plots import plot_needles
from hf_sparse_attention.evaluation.report import format_table, run_record, write_json
from hf_sparse_attention.metrics.needle_recall.needle_recall import NeedleRecall
from hf_sparse_attention.runs import make_accelerator, replace_files

BUNDLED_ESSAYS = os.path.relpath(Path(__file__).parent / "data" / "haystack.txt")


@dataclass
class NeedleArguments:
    models: list[str] = field(metadata={"help": "Checkpoints as name=path or path: folders, or models of the Hub."})
    tasks: list[str] = field(
        default_factory=lambda: ["s_niah_1", "s_niah_2", "s_niah_3"],
        metadata={
            "help": "s_niah_1 (noise text, number), s_niah_2 (essays, number), s_niah_3 (essays, UUID), "
            "mk_niah_1 (essays, number, three needles with other keys)."
        },
    )
    output_dir: str = field(
        default="outputs/needle", metadata={"help": "Folder for JSON, table, picture and answers."}
    )
    train_length: int | None = field(
        default=None, metadata={"help": "Length of the training rows; default: max_position_embeddings of the models."}
    )
    multiples: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 4.0, 8.0], metadata={"help": "Lengths as multiples of train_length."}
    )
    lengths: list[int] | None = field(default=None, metadata={"help": "Lengths in tokens, instead of multiples."})
    depths: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0],
        metadata={"help": "Where the needle lies: 0 is the start of the text, 1 its end."},
    )
    samples: int = field(default=20, metadata={"help": "Samples per task, length and depth."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples; the generation is greedy."})
    wording: str = field(default="ruler", metadata={"help": "ruler (RULER's sentences) or short (for small models)."})
    number_digits: int = field(default=7, metadata={"help": "Digits of a number; RULER has 7."})
    uuid_characters: int = field(
        default=36, metadata={"help": "Leading characters kept of a UUID; RULER keeps all 36."}
    )
    answer_tokens: int | None = field(
        default=None, metadata={"help": "Tokens kept free for the answer; default: what the answer takes, no more."}
    )
    decoding: str = field(
        default="generate",
        metadata={
            "help": "generate, or forced: one forward pass over prompt and right answer, found if every token of it "
            "is the most likely one. As strict and much faster at long lengths."
        },
    )
    bos: str = field(
        default="auto", metadata={"help": "BOS as first token: yes, no, or auto (if the tokenizer adds one itself)."}
    )
    haystack: list[str] = field(
        default_factory=lambda: [BUNDLED_ESSAYS],
        metadata={"help": "Essays: text files or one data set of the Hub. Default: the bundled excerpt of Emerson."},
    )
    cache_dir: str = field(
        default="outputs/needle_samples", metadata={"help": "Folder where samples are kept and found again."}
    )
    batch_tokens: int = field(default=8192, metadata={"help": "About how many tokens go through the model at once."})
    rope_scaling: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "none, yarn or dynamic (NTK) at evaluation: one for all models, or one per model."},
    )
    rope_factor: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the RoPE scaling; default: longest length / train_length for yarn, 2 for dynamic."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer of all models; default: saved with them."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})

    def __post_init__(self) -> None:
        if self.rope_factor is not None and set(self.rope_scaling) == {"none"}:
            raise ValueError(f"rope_factor is {self.rope_factor}, but rope_scaling is none: nothing to scale.")
        choices = (
            ("bos", self.bos, ("auto", "yes", "no")),
            ("dtype", self.dtype, DTYPES),
            ("decoding", self.decoding, tuple(DECODINGS)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks: there is no {task!r}; allowed: {', '.join(TASKS)}.")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths: {depth} is not between 0 and 1.")
        for multiple in self.multiples:
            if not 0 < multiple < math.inf:
                raise ValueError(f"multiples: {multiple} is not above 0 and finite.")
        for name in ("samples", "batch_tokens", "train_length", "answer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: at least 1.")
        self.format()

    def format(self) -> NeedleFormat:
        return NeedleFormat(self.wording, self.number_digits, self.uuid_characters)


def main() -> None:
    (args,) = parse_arguments(NeedleArguments, description=__doc__)
    accelerator = make_accelerator()
    try:
        with locked_folder(args.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
            evaluate(args, accelerator)
    except (CheckpointError, DataError, OSError, ValueError) as error:
        sys.exit(f"needle.py: error: {error}")
    accelerator.end_training()


def evaluate(args: NeedleArguments, accelerator: Accelerator) -> None:
    specs = parse_specs(args.models, args.rope_scaling)
    train_length = args.train_length or training_length(specs)
    lengths = sorted(set(args.lengths or (round(train_length * multiple) for multiple in args.multiples)))
    depths = sorted(set(args.depths))
    essays = "\n\n".join(iterate_texts(load_documents(args.haystack)))
    protocol = {
        "train_length": train_length,
        "lengths": lengths,
        "depths": depths,
        "samples_per_cell": args.samples,
        "tasks": args.tasks,
        "budget": "every sample has exactly the stated number of tokens, prompt and answer together",
        "answer_tokens": args.answer_tokens or "what each answer takes",
        "decoding": {
            "generate": "greedy, batched, padded on the left",
            "forced": "greedy: every token of the answer must be the most likely one after the right ones before it",
        }[args.decoding],
        "score": "share of the samples whose answer occurs in the generated text",
        "wording": dataclasses.asdict(args.format()),
        "bos": args.bos,
        "seed": args.seed,
    }
    accelerator.print("\n".join(f"{name}: {value}" for name, value in protocol.items()))

    results, answers = {}, {}
    for spec in specs:
        tokenizer = load_tokenizer(spec, args.tokenizer)
        source = NeedleSource(tokenizer, essays, args.format(), {"yes": True, "no": False, "auto": None}[args.bos])
        # The first process writes the cache, the others read it.
        with accelerator.main_process_first():
            cells = [
                cached_samples(
                    source,
                    Path(args.cache_dir),
                    task=task,
                    length=length,
                    depths=depths,
                    samples=args.samples,
                    seed=args.seed,
                    answer_tokens=args.answer_tokens,
                )
                for task in args.tasks
                for length in lengths
            ]
        model = load_model(
            spec,
            tokenizer,
            train_length=train_length,
            max_length=lengths[-1],
            rope_factor=args.rope_factor,
            dtype=args.dtype,
            device=accelerator.device,
        )
        total = sum(map(len, cells))
        bar = tqdm(total=total, unit="sample", disable=not accelerator.is_main_process, desc=spec.label)

        def progress(done: int, length: int, bar: tqdm = bar) -> None:
            bar.update(done * accelerator.num_processes)
            bar.set_postfix(length=length, refresh=False)

        own = run_grid(
            model,
            tokenizer,
            cells,
            decoding=args.decoding,
            batch_tokens=args.batch_tokens,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            progress=progress,
        )
        bar.close()
        found = sorted(gather_object(own), key=lambda a: (a.task, a.length, a.depth, a.index))
        answers[spec.label] = found
        results[spec.label] = {
            "path": spec.path,
            **describe_model(model),
            "recall": {task: recall_grid(found, task, lengths, depths) for task in args.tasks},
        }
        del model

    if accelerator.is_main_process:
        save(args, accelerator, protocol, results, answers)


def recall_grid(answers: list[NeedleAnswer], task: str, lengths: list[int], depths: list[float]) -> list[list[float]]:
    """Recall with one row per depth and one column per length."""
    metric = NeedleRecall(keep_in_memory=True)

    def cell(length: int, depth: float) -> float:
        here = [a for a in answers if (a.task, a.length, a.depth) == (task, length, depth)]
        return metric.compute(predictions=[a.prediction for a in here], references=[[a.answer] for a in here])[
            "needle_recall"
        ]

    return [[cell(length, depth) for length in lengths] for depth in depths]


def save(
    args: NeedleArguments,
    accelerator: Accelerator,
    protocol: dict,
    results: dict,
    answers: dict[str, list[NeedleAnswer]],
) -> None:
    lengths, depths, train_length = protocol["lengths"], protocol["depths"], protocol["train_length"]
    header = ["needles found", *(f"{length} ({length / train_length:g}x)" for length in lengths)]
    rows = []
    for name, result in results.items():
        for task, grid in result["recall"].items():
            # Every cell has the same number of samples, so the mean of cells is the mean of samples.
            means = [sum(column) / len(column) for column in zip(*grid)]
            result.setdefault("recall_by_length", {})[task] = dict(zip(map(str, lengths), means))
            rows.append([f"{name} {task}", *(f"{mean:.0%}" for mean in means)])
    table = (
        format_table(header, rows)
        + f"\n\nEach number: {len(depths) * args.samples} samples over {len(depths)} depths."
    )
    folder = Path(args.output_dir)
    record = run_record(dataclasses.asdict(args), accelerator.device, accelerator.num_processes)
    grids = {name: result["recall"] for name, result in results.items()}

    def write(temporary: Path) -> None:
        write_json(temporary / "needle.json", {"protocol": protocol, "checkpoints": results, "run": record})
        (temporary / "needle.md").write_text(table + "\n", encoding="utf-8")
        for name, found in answers.items():
            lines = (json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in found)
            (temporary / f"answers_{name.replace('/', '_')}.jsonl").write_text("".join(lines), encoding="utf-8")
        plot_needles(temporary / "needle.png", grids, lengths, depths, train_length)

    replace_files(folder, write)
    print(f"\n{table}\n\nWritten: {folder / 'needle.json'}, {folder / 'needle.md'}, {folder / 'needle.png'}")


if __name__ == "__main__":
    main()
