"""Running needle samples: a cache on disk, greedy answers by generation or by one forward pass, in batches."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import reset_dynamic_rope, tokenizer_fingerprint
from .needle_tasks import NeedleSample, NeedleSource


@dataclass(frozen=True)
class NeedleAnswer:
    """What a model answered to one sample."""

    task: str
    length: int
    depth: float
    index: int
    answer: str
    prediction: str


def cached_samples(
    source: NeedleSource,
    cache_dir: Path,
    *,
    task: str,
    length: int,
    depths: Sequence[float],
    samples: int,
    seed: int,
    answer_tokens: int | None = None,
) -> list[NeedleSample]:
    """``samples`` samples at every depth, from a file of the cache if there is one, else written to it.

    The file name carries task, length and seed, and a digest of everything else that the samples depend on (tokenizer,
    wording, text, depths, number), so a changed setting never reads an old file.
    """
    settings = {
        "tokenizer": tokenizer_fingerprint(source.tokenizer),
        **source.settings(),
        "depths": list(depths),
        "samples": samples,
        "answer_tokens": answer_tokens,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir / f"{task}_length{length}_seed{seed}_{digest}.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            return [NeedleSample(**json.loads(line)) for line in file]
    made = [
        source.sample(task, length, depth, seed, index, answer_tokens=answer_tokens)
        for depth in depths
        for index in range(samples)
    ]
    # Renamed when complete: another process or a later run never sees half a file.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(json.dumps(dataclasses.asdict(sample)) + "\n" for sample in made), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OSError(f"cache_dir: {path} could not be written ({error})") from error
    return made


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[NeedleSample]
) -> list[NeedleAnswer]:
    """Greedy answers to prompts of nearly the same length, padded on the left; each within its own token budget."""
    reset_dynamic_rope(model)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    width = max(len(sample.prompt_ids) for sample in samples)
    ids = torch.tensor([[pad] * (width - len(s.prompt_ids)) + s.prompt_ids for s in samples])
    mask = torch.tensor([[0] * (width - len(s.prompt_ids)) + [1] * len(s.prompt_ids) for s in samples])
    budgets = [sample.length - len(sample.prompt_ids) for sample in samples]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max(budgets), pad_token_id=pad, eos_token_id=tokenizer.eos_token_id
    )
    # Settings saved with a checkpoint (sampling, penalties) would fill the gaps of this one.
    model.generation_config = config
    generated = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))[:, width:]
    texts = [
        tokenizer.decode(row[:budget], skip_special_tokens=True) for row, budget in zip(generated.tolist(), budgets)
    ]
    return [
        NeedleAnswer(s.task, s.length, s.depth, s.index, s.answer, text)
        for s, text in zip(samples, texts, strict=True)
    ]


@torch.no_grad()
def check_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[NeedleSample]
) -> list[NeedleAnswer]:
    """Greedy answers up to their first wrong token, from one forward pass over prompts with their right answers.

    Greedy generation gives the right answer if and only if each of its tokens is the most likely one after the right
    tokens before it. No cache and no padding mask are needed, so long prompts fit in large batches.
    """
    reset_dynamic_rope(model)
    rows = [[*sample.prompt_ids, *sample.answer_ids] for sample in samples]
    width, first = max(map(len, rows)), min(len(sample.prompt_ids) for sample in samples)
    # Padding on the right is after all that matters.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=width - first + 1).logits
    else:
        logits = model(input_ids=ids, use_cache=False).logits[:, first - 1 :]
    answers = []
    for sample, likely in zip(samples, logits.argmax(-1).tolist(), strict=True):
        start = len(sample.prompt_ids) - first
        likely = likely[start : start + len(sample.answer_ids)]
        wrong = (i for i, (one, right) in enumerate(zip(likely, sample.answer_ids)) if one != right)
        text = tokenizer.decode(likely[: next(wrong, len(likely)) + 1], skip_special_tokens=True)
        answers.append(NeedleAnswer(sample.task, sample.length, sample.depth, sample.index, sample.answer, text))
    return answers


DECODINGS = {"generate": answer_batch, "forced": check_batch}


def run_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cells: Iterable[Sequence[NeedleSample]],
    *,
    decoding: str = "generate",
    batch_tokens: int = 8192,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[NeedleAnswer]:
    """This process's share of the answers to all samples.

    Batches do not depend on the number of processes, which take turns at them: the union is the same for any number.

    Args:
        cells: groups of samples of one length each.
        decoding: ``generate`` (:func:`answer_batch`) or ``forced`` (:func:`check_batch`).
        batch_tokens: about how many tokens go through the model at once.
        progress: called with (samples done by this step, length).
    """
    answers = []
    for cell in cells:
        size = max(1, batch_tokens // cell[0].length)
        batches = [cell[i : i + size] for i in range(0, len(cell), size)]
        for batch in batches[process::processes]:
            answers.extend(DECODINGS[decoding](model, tokenizer, batch))
            if progress:
                progress(len(batch), cell[0].length)
    return answers
