"""Needle samples: exact budgets, depth, seeds, any tokenizer."""

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_sparse_attention.evaluation.needle_tasks import TASKS, Haystack, NeedleFormat, NeedleSource
from hf_sparse_attention.evaluation.needle_training import make_training_rows
from hf_sparse_attention.evaluation.needle_words import ADJECTIVES, NOUNS, draw_keys

SHORT = NeedleFormat("short", number_digits=4, uuid_characters=8)


def word_tokenizer(essay):
    """Whole words, without any trace of spaces in the ids."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    numbers = " ".join(str(number) for number in range(1000, 10000))
    hexadecimal = " ".join("".join(pair) for pair in itertools.product("0123456789abcdef", repeat=2))
    text = [essay, numbers, hexadecimal, NOUNS, ADJECTIVES, "The number uuid of the is ."]
    backend.train_from_iterator(text, trainers.WordLevelTrainer(vocab_size=40000, special_tokens=["[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def metaspace_tokenizer(essay):
    """As SentencePiece: a space is put before the text and is part of the ids."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = list("0123456789abcdefghijklmnopqrstuvwxyz-.:?")
    backend.train_from_iterator(
        [essay], trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


# A vocabulary of whole words has no words for UUIDs.
CASES = [(kind, task) for kind in ("byte_bpe", "metaspace_bpe", "words") for task in TASKS]
CASES.remove(("words", "s_niah_3"))


@pytest.fixture(scope="module")
def tokenizers(tokenizer, essay):
    return {"byte_bpe": tokenizer, "metaspace_bpe": metaspace_tokenizer(essay), "words": word_tokenizer(essay)}


def flat(text):
    """Without the spaces that a tokenizer may add or lose around words."""
    return "".join(text.split())


@pytest.mark.parametrize(("kind", "task"), CASES)
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_budget_and_answer(tokenizers, essay, kind, task, depth):
    any_tokenizer = tokenizers[kind]
    source = NeedleSource(any_tokenizer, essay, SHORT)
    for length, index in ((97, 0), (211, 1)):
        sample = source.sample(task, length, depth, seed=5, index=index)
        assert len(sample.prompt_ids) + len(sample.answer_ids) == length
        assert flat(any_tokenizer.decode(sample.answer_ids)) == sample.answer
        text = flat(any_tokenizer.decode(sample.prompt_ids))
        value = TASKS[task].value
        assert text.endswith(flat(f"The {value} of the {sample.key} is"))
        assert text.count(flat(f"the {sample.key} is {sample.answer}.")) == 1
        assert text.count(sample.answer) == 1
        assert text.count(f"The{value}ofthe") == 2 + TASKS[task].distractors


@pytest.mark.parametrize("task", ["s_niah_1", "s_niah_2", "mk_niah_1"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_needle_lies_at_the_depth_and_between_sentences(tokenizer, essay, task, depth):
    source = NeedleSource(tokenizer, essay, SHORT)
    sample = source.sample(task, 509, depth)
    needle = tokenizer.encode(f" The number of the {sample.key} is {sample.answer}.", add_special_tokens=False)
    start = sample.needle_start
    assert sample.prompt_ids[start : start + len(needle)] == needle
    question = tokenizer.encode(f" The number of the {sample.key} is", add_special_tokens=False)
    text_tokens = len(sample.prompt_ids) - len(needle) - len(question)
    assert abs(start - depth * text_tokens) <= 1
    if depth > 0:
        assert tokenizer.decode(sample.prompt_ids[:start]).rstrip()[-1] in ".!?"


def test_ruler_wording_is_whole(tokenizer, essay):
    sample = NeedleSource(tokenizer, essay).sample("s_niah_3", 700, 0.5)
    text = tokenizer.decode(sample.prompt_ids)
    assert text.startswith(" A special magic uuid is hidden within the following text. Make sure to memorize it.")
    assert f"One of the special magic uuids for {sample.key} is: {sample.answer}." in text
    assert text.endswith(f"The special magic uuid for {sample.key} mentioned in the provided text is")
    assert (len(sample.answer), sample.key.count("-")) == (36, 1)


def test_samples_are_stable(tokenizer, essay):
    one = NeedleSource(tokenizer, essay, SHORT).sample("mk_niah_1", 160, 0.5, seed=3, index=7)
    assert one == NeedleSource(tokenizer, essay, SHORT).sample("mk_niah_1", 160, 0.5, seed=3, index=7)
    # Written down: published results must stay comparable.
    assert (one.key, one.answer) == ("river", "9834")
    others = [
        NeedleSource(tokenizer, essay, SHORT).sample("mk_niah_1", 160, 0.5, seed=seed, index=index)
        for seed, index in ((3, 8), (4, 7))
    ]
    assert len({sample.answer for sample in (one, *others)}) == 3


def test_tasks_differ_in_text_and_value(tokenizer, essay):
    source = NeedleSource(tokenizer, essay, NeedleFormat("short", 7, 36))
    by_task = {task: source.sample(task, 301, 1.0) for task in TASKS}
    assert "The grass is green." in tokenizer.decode(by_task["s_niah_1"].prompt_ids)
    assert "The grass is green." not in tokenizer.decode(by_task["s_niah_2"].prompt_ids)
    assert all(by_task[task].answer.isdigit() and len(by_task[task].answer) == 7 for task in ("s_niah_1", "mk_niah_1"))
    assert by_task["s_niah_3"].answer[14] == "4"  # the version digit of a random UUID


def test_bos_is_counted(tokenizer, essay):
    sample = NeedleSource(tokenizer, essay, SHORT, bos=True).sample("s_niah_1", 97, 0.5)
    assert sample.prompt_ids[0] == tokenizer.bos_token_id
    assert len(sample.prompt_ids) + len(sample.answer_ids) == 97


def test_room_for_the_answer_can_be_fixed(tokenizer, essay):
    source = NeedleSource(tokenizer, essay, SHORT)
    assert len(source.sample("s_niah_1", 97, 0.5, answer_tokens=16).prompt_ids) == 81
    with pytest.raises(ValueError, match="answer_tokens is 1"):
        source.sample("s_niah_1", 97, 0.5, answer_tokens=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "s_niah_9"}, "task is 's_niah_9'"),
        ({"length": 30}, "length 30 is too short for task s_niah_2"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"split": "test"}, "split is 'test'"),
    ],
)
def test_errors_name_the_argument(tokenizer, essay, changes, message):
    with pytest.raises(ValueError, match=message):
        NeedleSource(tokenizer, essay, SHORT).sample(**{"task": "s_niah_2", "length": 97, "depth": 0.5, **changes})


@pytest.mark.parametrize("changes", [{"wording": "long"}, {"number_digits": 0}, {"uuid_characters": 37}])
def test_format_errors_name_the_field(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        NeedleFormat(**changes)


def test_essay_tasks_need_an_essay(tokenizer):
    source = NeedleSource(tokenizer, None, SHORT)
    assert source.sample("s_niah_1", 97, 0.5).answer
    with pytest.raises(ValueError, match="essay_text is empty"):
        source.sample("s_niah_2", 97, 0.5)


def test_haystack_is_a_ring():
    haystack = Haystack([[1, 2, 3], [4, 5]])
    assert haystack.stretch(3, 7) == ([4, 5, 1, 2, 3, 4, 5], [0, 2, 5])
    assert haystack.stretch(-2, 3) == ([4, 5, 1], [0, 2])
    assert haystack.stretch(1, 1) == ([2], [])


def test_training_and_evaluation_share_no_key():
    import random

    nouns = {split: set(draw_keys(random.Random(0), 100, split, adjective=False)) for split in ("train", "eval")}
    assert not nouns["train"] & nouns["eval"]
    assert len(set(NOUNS.split())) == len(NOUNS.split())


def rows(count, *arguments, **settings):
    return list(itertools.islice(make_training_rows(*arguments, **settings), count))


def test_training_rows(tokenizer, essay):
    settings = {"length": 101, "tasks": ["s_niah_1", "s_niah_3"], "format": SHORT}
    made = rows(12, tokenizer, essay, **settings)
    for row in made:
        assert len(row["input_ids"]) == len(row["labels"]) == 101
        answer = [label for label in row["labels"] if label != -100]
        assert row["labels"][-len(answer) :] == answer == row["input_ids"][-len(answer) :]
        value = tokenizer.decode(answer).strip()
        assert tokenizer.decode(row["input_ids"]).count(value) == 2
    kinds = {"number" in tokenizer.decode(row["input_ids"]) for row in made}
    assert kinds == {True, False}
    assert rows(5, tokenizer, essay, **settings, start=7) == made[7:]
    assert rows(12, tokenizer, essay, **settings, seed=1) != made


def test_training_rows_with_loss_everywhere(tokenizer, essay):
    (row,) = rows(1, tokenizer, essay, length=101, format=SHORT, answer_only=False)
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("task", TASKS)
def test_training_rows_with_several_questions(tokenizer, essay, task):
    settings = {"length": 301, "tasks": [task], "format": SHORT, "questions": 5}
    made = rows(6, tokenizer, essay, **settings)
    counts = set()
    for row in made:
        assert len(row["input_ids"]) == len(row["labels"]) == 301
        text = tokenizer.decode(row["input_ids"])
        answers = [tokenizer.decode(list(group)) for kept, group in groups(row["labels"]) if kept]
        counts.add(len(answers))
        for answer in answers:
            # in its needle and as the answer
            assert text.count(answer) == 2
        assert text.endswith(answers[-1])
        assert text.count(f"The {TASKS[task].value} of the") >= max(2 * len(answers), 1 + TASKS[task].distractors)
    assert counts <= {2, 3, 4, 5}
    assert rows(2, tokenizer, essay, **settings, start=4) == made[4:]


def groups(labels):
    return ((kept, group) for kept, group in itertools.groupby(labels, lambda label: label != -100))


def test_several_questions_need_room(tokenizer, essay):
    (row,) = rows(1, tokenizer, essay, length=60, tasks=["s_niah_1"], format=SHORT, questions=5)
    assert sum(kept for kept, _ in groups(row["labels"])) == 1
    with pytest.raises(ValueError, match="length 20 is too short for task s_niah_1"):
        rows(1, tokenizer, essay, length=20, tasks=["s_niah_1"], format=SHORT, questions=5)
