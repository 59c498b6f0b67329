"""The synthetic generators: a plain program solves every sample, and the samples are distributed as they should be."""

import itertools
from collections import Counter

import pytest
import torch
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node

from hf_sparse_attention.data.synthetic import (
    BOS,
    EOS,
    IGNORED_LABEL,
    PAD,
    SEP,
    TASKS,
    iterable_dataset,
    make_task,
    map_dataset,
    write_parquet,
)
from hf_sparse_attention.data.synthetic.base import FIRST_SYMBOL
from hf_sparse_attention.data.synthetic.recall import Recall, distinct
from hf_sparse_attention.data.synthetic.sequences import FlipFlop


def solve_recall(source):
    """Read pairs by their separator, then answer the questions."""
    first = source.index(Recall.ASK)
    pairs = {}
    for place, token in enumerate(source[:first]):
        if token == Recall.PAIR:
            pairs[tuple(source[place - 2 : place])] = source[place + 1 : place + 3]
    questions = [source[start + 1 : start + 3] for start in range(first, len(source), 3)]
    return list(itertools.chain.from_iterable([Recall.ASK, *pairs[tuple(key)]] for key in questions))


def solve_flip_flop(source):
    state = None
    for command, bit in zip(source[::2], source[1::2]):
        state = bit if command == FlipFlop.WRITE else state
    return [state]


def solve_max_retrieval(source):
    items = list(zip(source[1::2], source[::2]))
    best = max(items)
    assert [priority for priority, _ in items].count(best[0]) == 1
    return [best[1]]


def solve_local_count(source):
    groups = [len(list(group)) for _, group in itertools.groupby(source)]
    return [FIRST_SYMBOL + 16 + i for size in groups for i in range(size)]


def solve_n_back(source):
    return [source[i - 2] if i >= 2 else FIRST_SYMBOL for i in range(len(source))]


SOLVERS = {
    "mqmtar": solve_recall,
    "copy": lambda source: source,
    "reverse": lambda source: source[::-1],
    "sort": sorted,
    "local_count": solve_local_count,
    "n_back": solve_n_back,
    "flip_flop": solve_flip_flop,
    "parity": lambda source: [FIRST_SYMBOL + sum(token - FIRST_SYMBOL for token in source) % 2],
    "max_retrieval": solve_max_retrieval,
}
LENGTHS = [(8, 8), (32, 64), (64, 131), (1003, 1003)]


def parts(task, row, labels):
    """Source and target of an unpadded row, after checking its special tokens."""
    assert row[0] == BOS
    assert row[-1] == EOS
    assert PAD not in row
    assert all(0 <= token < task.vocab_size for token in row)
    if task.tags:
        assert labels[:2] == [IGNORED_LABEL] * 2
        return row[1:-1], labels[2:]
    first = next(i for i, label in enumerate(labels) if label != IGNORED_LABEL)
    assert labels[first:] == row[first:]
    assert row.count(SEP) == task.separator
    if task.separator:
        assert row[first - 1] == SEP
    return row[1 : first - task.separator], row[first:-1]


def rows(task, length, batch, seed=0):
    samples = task.sample(batch, length, torch.Generator().manual_seed(seed))
    high = length if isinstance(length, int) else length[1]
    assert samples.input_ids.shape == samples.labels.shape == (batch, task.row_length(high))
    for ids, labels in zip(samples.input_ids.tolist(), samples.labels.tolist()):
        used = len(ids) - ids.count(PAD)
        assert set(ids[used:]) <= {PAD}
        assert set(labels[used:]) <= {IGNORED_LABEL}
        yield parts(task, ids[:used], labels[:used])


def test_every_task_has_a_solver():
    assert set(SOLVERS) == set(TASKS)


@pytest.mark.parametrize("length", LENGTHS, ids=str)
@pytest.mark.parametrize("name", TASKS)
def test_a_plain_program_solves_it(name, length):
    task = make_task(name)
    for source, target in rows(task, length, 50):
        assert target == SOLVERS[name](source)
        assert len(target) <= task.target_tokens(length[1])
        assert len(target) + (not task.tags) <= task.label_tokens(length[1])


@pytest.mark.parametrize(
    "options",
    [
        {"density": [0.1, 1.0], "gaps": "anywhere"},
        {"words": 65536},
        {"words": 12},
        {"queries": 1},
        {"queries": [1, 4]},
        {"key_symbols": [4, 7, 256], "value_symbols": [1, 256], "gaps": "anywhere", "density": [0.1, 1.0]},
        {"key_symbols": [11], "words": 20},
    ],
    ids=str,
)
def test_recall_with_other_options(options):
    task = make_task("mqmtar", **options)
    for source, target in rows(task, (8, 64), 200):
        assert target == solve_recall(source)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("flip_flop", "max_retrieval")])
def test_every_length_of_the_range_is_drawn(name):
    extra = {"mqmtar": 12}.get(name, 0)
    counts = Counter(len(source) - extra for source, _ in rows(make_task(name), (32, 64), 3300))
    assert set(counts) == set(range(32, 65))
    assert min(counts.values()) > 55
    assert max(counts.values()) < 155


@pytest.mark.parametrize("name", ["copy", "reverse", "sort"])
def test_symbols_are_uniform(name):
    counts = Counter(token for source, _ in rows(make_task(name), 64, 1000) for token in source)
    assert set(counts) == set(range(FIRST_SYMBOL, FIRST_SYMBOL + 32))
    # 2000 each; six standard deviations.
    assert all(abs(count - 2000) < 6 * 2000**0.5 for count in counts.values())


@pytest.mark.parametrize("name", ["copy", "reverse", "sort"])
def test_rows_of_few_symbols(name):
    task = make_task(name, row_symbols=[2, 5, 32])
    found = list(rows(task, 400, 300))
    assert all(target == SOLVERS[name](source) for source, target in found)
    sizes = Counter(len(set(source)) for source, _ in found)
    assert set(sizes) == {2, 5, 32}
    assert min(sizes.values()) > 60
    counts = Counter(token for source, _ in found for token in set(source) if len(set(source)) == 5)
    assert len(counts) == 32
    assert max(counts.values()) < 4 * min(counts.values())


def test_recall_of_few_symbols():
    sizes, values = Counter(), Counter()
    for source, _ in rows(make_task("mqmtar", density=0.95, key_symbols=[4, 9, 256], value_symbols=[1, 256]), 64, 600):
        pairs = [i for i, token in enumerate(source) if token == Recall.PAIR]
        keys = [tuple(source[i - 2 : i]) for i in pairs]
        assert len(pairs) == len(set(keys)) == 10
        used = len(set(itertools.chain.from_iterable(keys)))
        sizes["few" if used <= 4 else "some" if used <= 9 else "all"] += 1
        values[tuple(len({source[i + place] for i in pairs}) == 1 for place in (1, 2))] += 1
    # Each number for a third of the keys, and for half of the places of values.
    assert all(abs(sizes[name] - 200) < 70 for name in ("few", "some", "all"))
    assert all(abs(count - 150) < 6 * 150**0.5 for count in values.values())
    assert len(values) == 4


def test_symbols_of_few_words_are_uniform():
    counts = Counter()
    for source, _ in rows(make_task("mqmtar", key_symbols=[4], value_symbols=[2]), 64, 1500):
        for place, token in enumerate(source):
            if token == Recall.PAIR:
                counts.update(source[place - 2 : place] + source[place + 1 : place + 3])
    assert set(counts) == set(range(Recall.FIRST, Recall.FIRST + 256))
    mean = sum(counts.values()) / 256
    assert all(abs(count - mean) < 0.7 * mean for count in counts.values())


@pytest.mark.parametrize(
    ("name", "length", "classes"), [("parity", 33, 2), ("flip_flop", 40, 2), ("max_retrieval", 64, 16)]
)
def test_answers_are_uniform(name, length, classes):
    counts = Counter(target[0] for _, target in rows(make_task(name), length, 1600))
    assert len(counts) == classes
    assert all(abs(count - 1600 / classes) < 6 * (1600 / classes) ** 0.5 for count in counts.values())


def test_flip_flop_writes_as_often_as_asked():
    task = make_task("flip_flop", write_probability=0.3)
    commands = [command for source, _ in rows(task, 64, 500) for command in source[2:-1:2]]
    assert set(commands) == {FlipFlop.WRITE, FlipFlop.IGNORE}
    assert commands.count(FlipFlop.WRITE) / len(commands) == pytest.approx(0.3, abs=0.03)
    assert all(source[0] == FlipFlop.WRITE and source[-1] == FlipFlop.READ for source, _ in rows(task, 64, 20))


def test_local_count_runs_have_2_to_48_tokens():
    # The last run may be cut.
    groups = [
        [len(list(g)) for _, g in itertools.groupby(source)][:-1]
        for source, _ in rows(make_task("local_count"), 512, 400)
    ]
    sizes = Counter(itertools.chain.from_iterable(groups))
    assert set(sizes) <= set(range(2, 49))
    assert min(sizes) == 2
    assert max(sizes) == 48


@pytest.mark.parametrize("length", [64, 1000, 65536])
def test_recall_fills_four_fifths_with_pairs(length):
    for source, _ in rows(make_task("mqmtar"), length, 3):
        pairs = [i for i, token in enumerate(source) if token == Recall.PAIR]
        assert len(pairs) == int(0.8 * length) // 6
        keys = {tuple(source[i - 2 : i]) for i in pairs}
        values = {tuple(source[i + 1 : i + 3]) for i in pairs}
        assert len(keys) == len(values) == len(pairs)
        assert source[:length].count(Recall.BLANK) == length - 5 * len(pairs)


def test_recall_asks_for_every_place():
    asked = Counter()
    for source, _ in rows(make_task("mqmtar"), 64, 1000):
        keys = [source[i - 2 : i] for i, token in enumerate(source) if token == Recall.PAIR]
        asked.update(keys.index(source[i + 1 : i + 3]) for i, token in enumerate(source) if token == Recall.ASK)
    assert all(abs(asked[place] - 500) < 6 * 500**0.5 for place in range(8))


def test_recall_density_varies():
    task = make_task("mqmtar", density=[0.1, 1.0], gaps="anywhere")
    counts = Counter(source.count(Recall.PAIR) for source, _ in rows(task, 60, 900))
    assert set(counts) == set(range(1, 11))


def test_recall_number_of_queries_varies():
    found = list(rows(make_task("mqmtar", queries=[2, 4]), (32, 64), 900))
    counts = Counter(target.count(Recall.ASK) for _, target in found)
    assert set(counts) == {2, 3, 4}
    assert all(abs(count - 300) < 6 * 200**0.5 for count in counts.values())
    assert all(len(target) == 3 * source.count(Recall.ASK) for source, target in found)


def test_recall_gaps():
    """In slots the gap between two pairs is short; anywhere it is at times most of the row."""
    longest = {}
    for gaps in ("slots", "anywhere"):
        task = make_task("mqmtar", density=0.4, gaps=gaps)
        runs = [
            max(len(list(group)) for token, group in itertools.groupby(source) if token == Recall.BLANK)
            for source, _ in rows(task, 60, 300)
        ]
        longest[gaps] = max(runs)
    # 4 pairs in slots of 15 tokens.
    assert longest["slots"] <= 2 * 9 + 1
    assert longest["anywhere"] > 25


def test_pools_depend_on_their_seed():
    def words(seed):
        return {
            tuple(s[i - 2 : i])
            for s, _ in rows(make_task("mqmtar", words=50, pool_seed=seed), 64, 100)
            for i, t in enumerate(s)
            if t == Recall.PAIR
        }

    assert len(words(0)) == 50
    assert len(words(0) & words(1)) < 5


@pytest.mark.parametrize(("count", "words"), [(1, 5), (3, 16), (40, 10_000), (9, 10), (2000, 10_000)])
def test_distinct(count, words):
    drawn = distinct(count, words, 700, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert drawn.shape == (700, count)
    ordered = drawn.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert drawn.min() >= 0
    assert drawn.max() < words
    if words <= 16:
        # Every word is equally likely at every place.
        expected = 700 / words
        for place in range(count):
            seen = drawn[:, place].bincount(minlength=words)
            assert ((seen - expected).abs() < 6 * expected**0.5).all()


@pytest.mark.parametrize("name", TASKS)
def test_seeds(name):
    task = make_task(name)
    first, again, other = (task.sample(9, (20, 30), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.input_ids, other.input_ids)


@pytest.mark.parametrize("name", TASKS)
def test_map_style_streaming_and_parquet_agree(name, tmp_path):
    task = make_task(name)
    expected = list(map_dataset(task, (20, 33), 150, seed=5))
    assert len(expected) == 150
    assert len({tuple(row["input_ids"]) for row in expected}) > 140
    assert list(iterable_dataset(task, (20, 33), 150, seed=5)) == expected
    assert list(itertools.islice(iterable_dataset(task, (20, 33), seed=5), 150)) == expected
    path = write_parquet(task, (20, 33), 150, tmp_path / "folder" / "rows.parquet", seed=5)
    assert list(load_dataset("parquet", data_files=str(path), split="train")) == expected
    assert list(map_dataset(task, (20, 33), 10, seed=6)) != expected[:10]


def test_streaming_is_divided_between_nodes():
    whole = list(map_dataset(make_task("copy"), 9, 200))
    shared = [list(split_dataset_by_node(iterable_dataset(make_task("copy"), 9, 200), rank, 2)) for rank in (0, 1)]
    assert sorted(map(str, shared[0] + shared[1])) == sorted(map(str, whole))
    assert min(map(len, shared)) >= 72


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_task("sorting"), ["sorting", "sort"]),
        (lambda: make_task("sort", alphbet=3), ["alphbet", "alphabet"]),
        (lambda: make_task("sort", alphabet=1), ["alphabet", "1", "2"]),
        (lambda: make_task("mqmtar", density=[0.9, 0.1]), ["density", "0.9"]),
        (lambda: make_task("mqmtar", words=10**6), ["words", "65536"]),
        (lambda: make_task("mqmtar", gaps="none"), ["gaps", "slots", "anywhere"]),
        (lambda: make_task("sort", row_symbols=[1, 4]), ["row_symbols", "[1, 4]", "2 to 32"]),
        (lambda: make_task("copy", row_symbols=4), ["row_symbols", "4"]),
        (lambda: make_task("mqmtar", key_symbols=[3]).sample(2, 100), ["key_symbols", "13 words"]),
        (lambda: make_task("mqmtar", value_symbols=[0]), ["value_symbols", "1 to 256"]),
        (lambda: make_task("mqmtar", queries=0), ["queries", "0"]),
        (lambda: make_task("mqmtar", queries=[4, 1]), ["queries", "4, 1", "fewest"]),
        (lambda: make_task("flip_flop", write_probability=1.0), ["write_probability"]),
        (lambda: make_task("mqmtar").sample(2, 5), ["length", "5", "6"]),
        (lambda: make_task("copy").sample(2, (9, 4)), ["9 to 4"]),
        (lambda: map_dataset(make_task("copy"), 4, 0), ["samples", "0"]),
    ],
)
def test_refusals_say_what_is_allowed(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words)
