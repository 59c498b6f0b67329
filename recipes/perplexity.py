"""Perplexity of one or several checkpoints at lengths up to and beyond the one they were trained at.

    accelerate launch recipes/perplexity.py recipes/configs/eval/perplexity.yaml --models a=out/a b=out/b
    python recipes/perplexity.py --models a=out/a b=out/b --data texts.jsonl.xz --output_dir outputs/perplexity

The same target tokens are predicted at every length, only their context grows. Writes perplexity.json, perplexity.md
and perplexity.png into output_dir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.checkpoints import locked_folder
from hf_sparse_attention.data import DataError, load_documents
from hf_sparse_attention.evaluation.checkpoints import (
    DTYPES,
    CheckpointError,
    CheckpointSpec,
    describe_model,
    load_model,
    load_tokenizer,
    parse_specs,
    tokenizer_fingerprint,
    training_length,
)
from hf_sparse_attention.evaluation.perplexity import (
    PerplexityPlan,
    WindowLoss,
    make_windows,
    run_plan,
    summarize_positions,
    unigram_perplexity,
)
from hf_sparse_attention.evaluation.plots import plot_perplexity
from hf_sparse_attention.evaluation.report import format_number, format_table, run_record, write_json
from hf_sparse_attention.metrics.perplexity_by_length.perplexity_by_length import PerplexityByLength
from hf_sparse_attention.runs import make_accelerator, replace_files


@dataclass
class PerplexityArguments:
    models: list[str] = field(metadata={"help": "Checkpoints as name=path or path: folders, or models of the Hub."})
    data: list[str] = field(
        metadata={"help": "Text: .txt, .jsonl, .parquet (also .xz, .gz) files, or one data set of the Hub."}
    )
    output_dir: str = field(default="outputs/perplexity", metadata={"help": "Folder for JSON, table and picture."})
    train_length: int | None = field(
        default=None, metadata={"help": "Length of the training rows; default: max_position_embeddings of the models."}
    )
    multiples: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 4.0, 8.0], metadata={"help": "Lengths as multiples of train_length."}
    )
    lengths: list[int] | None = field(default=None, metadata={"help": "Lengths in tokens, instead of multiples."})
    target_tokens: int | None = field(
        default=None,
        metadata={"help": "Last tokens of each window that are predicted; default: half of the shortest length."},
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens from one window's end to the next one's; default: target_tokens."}
    )
    windows_per_document: int | None = field(default=None, metadata={"help": "At most so many windows; default: all."})
    max_documents: int | None = field(default=None, metadata={"help": "Read only the first so many documents."})
    max_document_tokens: int | None = field(
        default=None, metadata={"help": "Cut documents to their first so many tokens."}
    )
    bos: str = field(
        default="auto",
        metadata={"help": "BOS as first token of every window: yes, no, or auto (if the tokenizer adds one itself)."},
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
    text_field: str = field(default="text", metadata={"help": "Field of the records that holds the text."})
    split: str = field(default="validation", metadata={"help": "Split of a data set of the Hub."})
    subset: str | None = field(default=None, metadata={"help": "Configuration of a data set of the Hub."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    confidence: float = field(default=0.95, metadata={"help": "Level of the bootstrap interval over documents."})
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap; nothing else is random."})

    def __post_init__(self) -> None:
        if self.rope_factor is not None and set(self.rope_scaling) == {"none"}:
            raise ValueError(f"rope_factor is {self.rope_factor}, but rope_scaling is none: nothing to scale.")
        for name, value, allowed in (("bos", self.bos, ("auto", "yes", "no")), ("dtype", self.dtype, DTYPES)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
        counts = ("batch_tokens", "resamples", "train_length", "target_tokens", "stride")
        for name in (*counts, "max_documents", "max_document_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: at least 1.")
        for multiple in self.multiples:
            if not 0 < multiple < math.inf:
                raise ValueError(f"multiples: {multiple} is not above 0 and finite.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; allowed: between 0 and 1.")


def main() -> None:
    (args,) = parse_arguments(PerplexityArguments, description=__doc__)
    accelerator = make_accelerator()
    try:
        with locked_folder(args.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
            evaluate(args, accelerator)
    except (CheckpointError, DataError, OSError, ValueError) as error:
        sys.exit(f"perplexity.py: error: {error}")
    accelerator.end_training()


def evaluate(args: PerplexityArguments, accelerator: Accelerator) -> None:
    specs = parse_specs(args.models, args.rope_scaling)
    train_length = args.train_length or training_length(specs)
    tokenizer = shared_tokenizer(specs, args.tokenizer)
    lengths = sorted(set(args.lengths or (round(train_length * multiple) for multiple in args.multiples)))
    target_tokens = args.target_tokens or max(1, lengths[0] // 2)
    plan = PerplexityPlan(
        lengths=tuple(lengths),
        target_tokens=target_tokens,
        stride=args.stride or target_tokens,
        windows_per_document=args.windows_per_document,
        bos_id=bos_id(tokenizer, args.bos),
    )
    documents = read_documents(args, tokenizer)
    windows = make_windows(documents, plan)
    used = {window.document for window in windows}
    protocol = {
        "train_length": train_length,
        "lengths": lengths,
        "window": "the tokens up to the same last target; same targets at every length, only the context grows",
        "target_tokens": plan.target_tokens,
        "stride": plan.stride,
        "windows": len(windows),
        "documents": len(used),
        "documents_too_short": len(documents) - len(used),
        "truncation": "none" if args.max_document_tokens is None else f"first {args.max_document_tokens} tokens",
        "bos": "none" if plan.bos_id is None else f"token {plan.bos_id} first in every window, counted in its length",
        "interval": f"{args.confidence:.0%} bootstrap over documents, {args.resamples} resamples, seed {args.seed}",
    }
    accelerator.print("\n".join(f"{name}: {value}" for name, value in protocol.items()))

    results = {}
    for spec in specs:
        model = load_model(
            spec,
            tokenizer,
            train_length=train_length,
            max_length=plan.max_length,
            rope_factor=args.rope_factor,
            dtype=args.dtype,
            device=accelerator.device,
        )
        bar = tqdm(
            total=len(windows) * sum(lengths), unit="tok", unit_scale=True, disable=not accelerator.is_main_process
        )
        bar.set_description(spec.label)

        def progress(tokens: int, length: int, bar: tqdm = bar) -> None:
            bar.update(tokens * accelerator.num_processes)
            bar.set_postfix(length=length, refresh=False)

        own = run_plan(
            model,
            documents,
            plan,
            batch_tokens=args.batch_tokens,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            progress=progress,
        )
        bar.close()
        results[spec.label] = {
            "path": spec.path,
            **describe_model(model),
            **summarize(gather_object(own), plan, args),
        }
        del model

    if accelerator.is_main_process:
        save(args, accelerator, protocol, results, unigram_perplexity([documents[i] for i in sorted(used)]))


def shared_tokenizer(specs: list[CheckpointSpec], override: str | None) -> PreTrainedTokenizerBase:
    """The one tokenizer of all models: perplexities per token compare only with the same tokens."""
    tokenizer = load_tokenizer(specs[0], override)
    for spec in specs[1:]:
        if tokenizer_fingerprint(load_tokenizer(spec, override)) != tokenizer_fingerprint(tokenizer):
            raise CheckpointError(
                f"models: {spec.name} and {specs[0].name} have different tokenizers, so their perplexities per token "
                f"do not compare; measure them in separate runs."
            )
    return tokenizer


def bos_id(tokenizer: PreTrainedTokenizerBase, choice: str) -> int | None:
    if choice == "no":
        return None
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if choice == "yes" and tokenizer.bos_token_id is None:
        raise CheckpointError("bos is yes, but the tokenizer has no BOS token.")
    return tokenizer.bos_token_id if choice == "yes" or adds_bos else None


def read_documents(args: PerplexityArguments, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    dataset = load_documents(args.data, text_field=args.text_field, split=args.split, subset=args.subset)
    if args.max_documents is not None:
        dataset = dataset.take(args.max_documents)
    documents = []
    # Several at a time, which fast tokenizers put on all cores.
    for batch in dataset.iter(batch_size=64):
        texts = [text or "" for text in batch["text"]]
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        documents.extend(document[: args.max_document_tokens] for document in ids["input_ids"])
    return documents


def summarize(losses: list[WindowLoss], plan: PerplexityPlan, args: PerplexityArguments) -> dict:
    # The order of gathering depends on the number of processes; sums must not.
    losses = sorted(losses, key=lambda loss: (loss.length, loss.document, loss.bucket is not None, loss.nll))
    targets = [loss for loss in losses if loss.bucket is None]
    by_length = PerplexityByLength(keep_in_memory=True).compute(
        nll=[loss.nll for loss in targets],
        tokens=[loss.tokens for loss in targets],
        lengths=[loss.length for loss in targets],
        documents=[loss.document for loss in targets],
        confidence=args.confidence,
        resamples=args.resamples,
        seed=args.seed,
    )
    return {"by_length": by_length, "by_position": summarize_positions(losses, plan)}


def save(args: PerplexityArguments, accelerator: Accelerator, protocol: dict, results: dict, unigram: float) -> None:
    lengths, train_length = protocol["lengths"], protocol["train_length"]
    header = ["perplexity [interval]", *(f"{length} ({length / train_length:g}x)" for length in lengths)]
    rows = []
    for name, result in results.items():
        cells = (result["by_length"][str(length)] for length in lengths)
        numbers = ([format_number(cell[key]) for key in ("perplexity", "low", "high")] for cell in cells)
        rows.append([name, *(f"{mean} [{low}, {high}]" for mean, low, high in numbers)])
    positions = next(iter(results.values()))["by_position"]
    position_header = ["loss by position", *(f"{bucket['first']}-{bucket['last']}" for bucket in positions)]
    position_rows = [
        [name, *(f"{bucket['loss']:.3f}" for bucket in result["by_position"])] for name, result in results.items()
    ]
    table = "\n\n".join(
        [
            format_table(header, rows),
            format_table(position_header, position_rows),
            f"Unigram model fitted to these documents: perplexity {format_number(unigram)}.",
        ]
    )
    folder = Path(args.output_dir)
    record = run_record(dataclasses.asdict(args), accelerator.device, accelerator.num_processes)
    content = {"protocol": protocol, "unigram_perplexity": unigram, "checkpoints": results, "run": record}

    def write(temporary: Path) -> None:
        write_json(temporary / "perplexity.json", content)
        (temporary / "perplexity.md").write_text(table + "\n", encoding="utf-8")
        reference = unigram if math.isfinite(unigram) else None
        plot_perplexity(temporary / "perplexity.png", results, train_length, unigram=reference)

    replace_files(folder, write)
    print(
        f"\n{table}\n\nWritten: {folder / 'perplexity.json'}, {folder / 'perplexity.md'}, {folder / 'perplexity.png'}"
    )


if __name__ == "__main__":
    main()
