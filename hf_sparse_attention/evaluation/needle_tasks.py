"""Needle-in-a-haystack samples after RULER (arXiv 2404.06654), for any tokenizer and with exact token budgets.

A needle states the value of a key; it lies between two sentences of a long text, and the prompt ends by asking for
that value. ``length`` counts every token of a sample: BOS, instruction, text, needles, question *and* answer. All
parts are joined by spaces, where RULER breaks lines around the text.

    s_niah_1    noise text (five short sentences repeated), word key, number
    s_niah_2    essay text, word key, number
    s_niah_3    essay text, word key, UUID
    mk_niah_1   s_niah_2 plus three needles with other keys and values

Evaluation:

    source = NeedleSource(tokenizer, essay_text)
    sample = source.sample("s_niah_2", length=1024, depth=0.5, seed=0, index=3)
    model.generate(sample.prompt_ids, max_new_tokens=len(sample.answer_ids))  # should give sample.answer

Training on retrieval (needle_training.py) draws other keys, other values and another essay text.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .needle_words import draw_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class NeedleTask:
    """What one task hides in which text."""

    haystack: str
    value: str
    distractors: int = 0


TASKS: dict[str, NeedleTask] = {
    "s_niah_1": NeedleTask("noise", "number"),
    "s_niah_2": NeedleTask("essay", "number"),
    "s_niah_3": NeedleTask("essay", "uuid"),
    "mk_niah_1": NeedleTask("essay", "number", distractors=3),
}


@dataclass(frozen=True)
class Wording:
    """The sentences around a value. ``{kind}`` is number or uuid."""

    instruction: str
    needle: str
    question: str
    adjective_in_key: bool


WORDINGS: dict[str, Wording] = {
    # RULER's own sentences, with its answer prefix: about 70 tokens of a large vocabulary.
    "ruler": Wording(
        "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kind} afterwards.",
        "One of the special magic {kind}s for {key} is: {value}.",
        "What is the special magic {kind} for {key} mentioned in the provided text? "
        "The special magic {kind} for {key} mentioned in the provided text is",
        adjective_in_key=True,
    ),
    # For small models and short training contexts: the question repeats the needle up to its value.
    "short": Wording("", "The {kind} of the {key} is {value}.", "The {kind} of the {key} is", adjective_in_key=False),
}


@dataclass(frozen=True)
class NeedleFormat:
    """Wording and value sizes. RULER: wording ``ruler``, 7 digits, 36 characters; small models need less.

    Raises:
        ValueError: a field is out of range; the message names field, value and what is allowed.
    """

    wording: str = field(default="ruler", metadata={"help": "ruler, or short (for small models)"})
    number_digits: int = field(default=7, metadata={"help": "digits of a number, 1 to 18"})
    uuid_characters: int = field(default=36, metadata={"help": "leading characters kept of a UUID, 1 to 36"})

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise ValueError(f"wording is {self.wording!r}; allowed: {', '.join(WORDINGS)}.")
        if not 1 <= self.number_digits <= 18:
            raise ValueError(f"number_digits is {self.number_digits!r}; allowed: 1 to 18.")
        if not 1 <= self.uuid_characters <= 36:
            raise ValueError(f"uuid_characters is {self.uuid_characters!r}; allowed: 1 to 36.")

    def draw_value(self, kind: str, rng: random.Random) -> str:
        if kind == "number":
            return str(rng.randrange(10 ** (self.number_digits - 1), 10**self.number_digits))
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))[: self.uuid_characters]


@dataclass(frozen=True)
class NeedleSample:
    """One prompt and its answer; ``len(prompt_ids) + len(answer_ids) == length``."""

    task: str
    length: int
    depth: float  # share of the text (other needles included) before the needle, from 0 to 1
    seed: int
    index: int
    key: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]
    needle_start: int  # token position of the needle within prompt_ids


class Haystack:
    """A text as token ids that remembers where its sentences start; read as a ring, so never too short."""

    def __init__(self, sentences: Sequence[list[int]]) -> None:
        self.ids: list[int] = []
        self.starts: list[int] = []
        for sentence in sentences:
            if sentence:
                self.starts.append(len(self.ids))
                self.ids.extend(sentence)
        if not self.ids:
            raise ValueError("the text of the haystack is empty.")

    def stretch(self, start: int, count: int) -> tuple[list[int], list[int]]:
        """``count`` ids from position ``start``, and the offsets within them at which sentences start."""
        ids, starts, size = [], [], len(self.ids)
        position = start % size
        while len(ids) < count:
            taken = min(count - len(ids), size - position)
            first = bisect.bisect_left(self.starts, position)
            last = bisect.bisect_left(self.starts, position + taken)
            starts.extend(len(ids) + s - position for s in self.starts[first:last])
            ids.extend(self.ids[position : position + taken])
            position = 0
        return ids, starts


class NeedleSource:
    """Makes needle samples for one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer.
        essay_text: text for the essay tasks; RULER uses long essays. The noise task does not need it.
        format: wording and value sizes.
        bos: put the BOS token first. Default: if the tokenizer itself does so.

    Raises:
        ValueError: ``bos`` is asked for and the tokenizer has no BOS token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        essay_text: str | None = None,
        format: NeedleFormat | None = None,
        bos: bool | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.format = format or NeedleFormat()
        self.wording = WORDINGS[self.format.wording]
        self._lead = _word_lead(tokenizer)
        self._prefix = _bos_ids(tokenizer, bos)
        self._texts = {"noise": NOISE, "essay": essay_text}
        self._haystacks: dict[str, Haystack] = {}

    def settings(self) -> dict[str, object]:
        """What, besides the tokenizer and the arguments of ``sample``, determines the samples."""
        essay = self._texts["essay"] or ""
        return {
            **dataclasses.asdict(self.format),
            "essay": hashlib.sha256(essay.encode()).hexdigest(),
            "bos": bool(self._prefix),
        }

    def haystack(self, kind: str) -> Haystack:
        if kind not in self._haystacks:
            text = self._texts[kind]
            if not text or not text.strip():
                raise ValueError(f"the tasks with {kind} text need a text to hide needles in; essay_text is empty.")
            sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if part.strip()]
            self._haystacks[kind] = Haystack([self._encode(sentence) for sentence in sentences])
        return self._haystacks[kind]

    def sample(
        self,
        task: str,
        length: int,
        depth: float,
        seed: int = 0,
        index: int = 0,
        split: str = "eval",
        answer_tokens: int | None = None,
    ) -> NeedleSample:
        """One sample of exactly ``length`` tokens; the same arguments always give the same sample.

        Args:
            task: a key of ``TASKS``.
            length: tokens of prompt and answer together.
            depth: where the needle lies, 0 (start of the text) to 1 (its end).
            seed, index: which sample.
            split: ``eval`` or ``train``; their keys and random numbers are disjoint.
            answer_tokens: tokens kept free for the answer; default: what the answer itself takes.

        Raises:
            ValueError: unknown task or split, depth outside [0, 1], or a length too short for needles and question.
        """
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; allowed: {', '.join(TASKS)}.")
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depth is {depth!r}; allowed: 0 to 1.")
        spec = TASKS[task]
        rng = random.Random(f"{split}/{task}/{length}/{depth:.6f}/{seed}/{index}")
        keys = draw_keys(rng, 1 + spec.distractors, split, self.wording.adjective_in_key)
        values = self._draw_values(rng, spec, len(keys))
        needles = [self._phrase(self.wording.needle, spec, k, v) for k, v in zip(keys, values, strict=True)]
        question = self._phrase(self.wording.question, spec, keys[0])
        instruction = self._phrase(self.wording.instruction, spec)
        answer = self._encode(values[0])

        needed = sum(map(len, (self._prefix, instruction, question, *needles)))
        reserved = len(answer) if answer_tokens is None else answer_tokens
        if reserved < len(answer):
            raise ValueError(f"answer_tokens is {answer_tokens}; the answer {values[0]!r} alone takes {len(answer)}.")
        free = length - needed - reserved
        if free < 0:
            raise ValueError(
                f"length {length} is too short for task {task}: needles, question and answer take {needed + reserved} "
                f"tokens with this tokenizer. Use a longer length, the wording 'short' or fewer digits."
            )
        before, after = self._split_text(rng, self.haystack(spec.haystack), free, depth, needles[1:])
        prompt = [*self._prefix, *instruction, *before]
        return NeedleSample(
            task=task,
            length=length,
            depth=depth,
            seed=seed,
            index=index,
            key=keys[0],
            answer=values[0],
            prompt_ids=[*prompt, *needles[0], *after, *question],
            answer_ids=answer,
            needle_start=len(prompt),
        )

    def questions_row(
        self, task: str, length: int, questions: int, seed: int = 0, index: int = 0, split: str = "train"
    ) -> tuple[list[int], list[bool]]:
        """A row of exactly ``length`` tokens that hides several needles and asks for them one after the other.

        More of it is answers than of a sample with one question. Needles and questions take at most half of the row,
        but for the first question; the task's distractors are needles that may be asked for too.

        Returns:
            The token ids, and which of them are answers.

        Raises:
            ValueError: unknown task or split, or a length too short for one question.
        """
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; allowed: {', '.join(TASKS)}.")
        spec = TASKS[task]
        rng = random.Random(f"questions/{split}/{task}/{length}/{questions}/{seed}/{index}")
        keys = draw_keys(rng, max(questions, 1 + spec.distractors), split, self.wording.adjective_in_key)
        values = self._draw_values(rng, spec, len(keys))
        beginning = [*self._prefix, *self._phrase(self.wording.instruction, spec)]
        needles, asked, room = [], [], length - len(beginning)
        for number, (key, value) in enumerate(zip(keys, values, strict=True)):
            needle = self._phrase(self.wording.needle, spec, key, value)
            question, answer = self._phrase(self.wording.question, spec, key), self._encode(value)
            taken = len(needle) + len(question) + len(answer)
            if number < questions and (not asked or room - taken >= length // 2):
                asked.append((question, answer))
                room -= taken
                needles.append(needle)
            elif number <= spec.distractors:
                room -= len(needle)
                needles.append(needle)
        if room < 0:
            raise ValueError(
                f"length {length} is too short for task {task}: needles, question and answer take {length - room} "
                f"tokens with this tokenizer. Use a longer length, the wording 'short' or fewer digits."
            )
        haystack = self.haystack(spec.haystack)
        text = _insert(rng, *haystack.stretch(rng.choice(haystack.starts), room), needles)
        ids = [*beginning, *text]
        is_answer = [False] * len(ids)
        for question, answer in rng.sample(asked, len(asked)):
            ids += [*question, *answer]
            is_answer += [False] * len(question) + [True] * len(answer)
        return ids, is_answer

    def _draw_values(self, rng: random.Random, spec: NeedleTask, count: int) -> list[str]:
        values: list[str] = []
        while len(values) < count:
            value = self.format.draw_value(spec.value, rng)
            if value not in values:
                values.append(value)
        return values

    def _split_text(
        self, rng: random.Random, haystack: Haystack, free: int, depth: float, distractors: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        """The text before and after the needle: together ``free`` haystack tokens and all distractors.

        The needle lies at a sentence start, and the haystack is cut at its two outer ends only.
        """
        left_total = round(depth * (free + sum(map(len, distractors))))
        left, right = [], []
        for distractor in distractors:
            fits = sum(map(len, left)) + len(distractor) <= left_total
            # The remaining room on the right must hold what does not go to the left.
            room_right = free + sum(map(len, distractors)) - left_total - sum(map(len, right))
            goes_left = fits and (rng.random() < depth or room_right < len(distractor))
            (left if goes_left else right).append(distractor)
        left_free = max(0, left_total - sum(map(len, left)))
        left_free = min(left_free, free)
        start = rng.choice(haystack.starts)
        before = _insert(rng, *haystack.stretch(start - left_free, left_free), left)
        after = _insert(rng, *haystack.stretch(start, free - left_free), right)
        return before, after

    def _phrase(self, template: str, spec: NeedleTask, key: str = "", value: str = "") -> list[int]:
        return self._encode(template.format(kind=spec.value, key=key, value=value))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(self._lead + text, add_special_tokens=False) if text else []


def _insert(rng: random.Random, ids: list[int], starts: list[int], needles: Sequence[list[int]]) -> list[int]:
    """``ids`` with each needle put at a sentence start (or at the front when there is none)."""
    places = sorted((rng.choice(starts) if starts else 0 for _ in needles), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        ids = ids[:place] + needle + ids[place:]
    return ids


def _word_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to put before a text so that its ids can be appended to those of another: a space, or nothing."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    whole = encode("here it is")
    return "" if encode("here") + encode("it is") == whole else " "


def _bos_ids(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> list[int]:
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos is true, but the tokenizer has no BOS token.")
    if bos is None:
        first = tokenizer.encode("a")[:1]
        bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if bos else []
