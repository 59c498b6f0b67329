"""Packing: rows hold the documents in full, boundaries are kept, and any position can be continued."""

import contextlib
import itertools
import json

import pytest
import torch
from datasets import Dataset

from hf_sparse_attention.data import (
    DataError,
    MixedRows,
    PackedRows,
    collate_rows,
    count_labels,
    step_rows,
    tokenize_documents,
    train_tokenizer,
)

LENGTH = 31


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 300)


def sources(documents, tokenizer):
    data = Dataset.from_dict({"text": documents})
    return {
        "list": documents,
        "dataset": data,
        "tokens": tokenize_documents(data, tokenizer),
        "stream": data.to_iterable_dataset(num_shards=3),
    }


def take(rows, count):
    return list(itertools.islice(rows, count))


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a[name], b[name]) for a, b in zip(left, right) for name in a)


def packed(documents, tokenizer, **changes):
    return PackedRows(documents, tokenizer, LENGTH, **{"seed": 5, "block_tokens": 700, **changes})


@pytest.mark.parametrize("kind", ["list", "dataset", "tokens", "stream"])
def test_an_epoch_holds_every_document_once(documents, tokenizer, kind):
    # One block: only the tail after its last full row is missing.
    rows = list(packed(sources(documents, tokenizer)[kind], tokenizer, epochs=1, block_tokens=10**6))
    pieces = [torch.tensor([0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]) for text in documents]
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    total = sum(map(len, pieces))
    assert len(rows) == total // LENGTH
    found = torch.cat([row["input_ids"] for row in rows]).bincount(minlength=300)
    missing = torch.cat(pieces).bincount(minlength=300) - found
    assert missing.min() >= 0
    assert missing.sum() == total % LENGTH
    if kind == "stream":  # stored order: before the shuffling of rows this is the plain concatenation
        wanted = {tuple(row.tolist()) for row in torch.cat(pieces)[: len(rows) * LENGTH].view(-1, LENGTH)}
        assert {tuple(row["input_ids"].tolist()) for row in rows} == wanted


def test_boundaries(documents, tokenizer):
    rows = list(packed(documents, tokenizer, epochs=1))
    assert any(int((row["position_ids"] == 0).sum()) > 1 for row in rows)
    for row in rows:
        ids, labels, positions = row["input_ids"].tolist(), row["labels"].tolist(), row["position_ids"].tolist()
        expected = -1
        for place in range(LENGTH):
            first = ids[place] == tokenizer.bos_token_id
            expected = 0 if first or place == 0 else expected + 1
            assert positions[place] == expected
            assert labels[place] == (-100 if first else ids[place])


def test_attention_may_cross_documents(documents, tokenizer):
    for row in packed(documents, tokenizer, epochs=1, cross_documents=True):
        assert "position_ids" not in row  # a model counts by itself
        assert torch.equal(row["labels"], row["input_ids"])


def test_seed_and_epoch_change_the_order(documents, tokenizer):
    once = list(packed(documents, tokenizer, epochs=1))
    twice = list(packed(documents, tokenizer, epochs=2))
    assert same(once, list(packed(documents, tokenizer, epochs=1)))
    assert same(once, twice[: len(once)])
    assert not same(once, twice[len(once) :])
    assert not same(once, list(packed(documents, tokenizer, epochs=1, seed=6)))


@pytest.mark.parametrize("kind", ["list", "dataset", "tokens", "stream"])
@pytest.mark.parametrize("taken", [0, 1, 22, 23, 24, 100, 333])
def test_continue_anywhere(documents, tokenizer, kind, taken):
    whole = take(packed(sources(documents, tokenizer)[kind], tokenizer), taken + 60)
    first = packed(sources(documents, tokenizer)[kind], tokenizer)
    assert same(take(first, taken), whole[:taken])
    second_source = sources(documents, tokenizer)[kind]
    next(iter(second_source))  # a data set that was looked at before still starts at its beginning
    second = packed(second_source, tokenizer)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert same(take(second, 60), whole[taken:])


def extra_rows(start):
    for number in itertools.count(start):
        yield {"input_ids": [200 + number % 50] * LENGTH, "labels": [-100] * (LENGTH - 1) + [number]}


@pytest.mark.parametrize("taken", [0, 17, 90])
def test_mixture_continues_and_has_its_share(documents, tokenizer, taken):
    whole = take(MixedRows(packed(documents, tokenizer), extra_rows, 0.3), 400)
    first = MixedRows(packed(documents, tokenizer), extra_rows, 0.3)
    take(first, taken)
    second = MixedRows(packed(documents, tokenizer), extra_rows, 0.3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert same(take(second, 60), whole[taken : taken + 60])
    numbers = [int(row["labels"][-1]) for row in whole if int(row["labels"][:-1].max()) == -100]
    assert numbers == list(range(len(numbers)))
    assert 90 < len(numbers) < 150


def test_labels_of_extra_rows_have_their_weight(documents, tokenizer):
    plain = take(MixedRows(packed(documents, tokenizer), extra_rows, 0.3), 40)
    weighted = take(MixedRows(packed(documents, tokenizer), extra_rows, 0.3, weight=2.5), 40)
    found = [row.pop("label_weights").unique().tolist() for row in weighted]
    assert same(weighted, plain)
    assert found == [[2.5 if int(row["labels"][:-1].max()) == -100 else 1.0] for row in plain]


def test_documents_are_tokenized_once(documents, tokenizer):
    data = Dataset.from_dict({"text": [documents[0], " ", None, documents[1]]})
    tokens = tokenize_documents(data, tokenizer)
    whole = tokenizer(documents[1], add_special_tokens=False)["input_ids"]
    assert tokens["input_ids"][3] == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
    assert [len(ids) for ids in tokens["input_ids"]][1:3] == [0, 0]
    tokenizer("the tokenizer has been used since")
    assert tokenize_documents(data, tokenizer)._fingerprint == tokens._fingerprint
    other = train_tokenizer(documents, 280)
    assert tokenize_documents(data, other)._fingerprint != tokens._fingerprint


def test_every_epoch_holds_all_tokens_in_another_order(documents, tokenizer):
    tokens = tokenize_documents(Dataset.from_dict({"text": documents}), tokenizer)
    once, again = (
        list(packed(tokens, tokenizer, epochs=epochs, block_tokens=10**6, seed=3))[-rows:]
        for epochs, rows in ((1, 0), (2, sum(map(len, tokens["input_ids"])) // LENGTH))
    )
    assert len(once) == len(again)
    assert not same(once, again)
    counts = [torch.cat([row["input_ids"] for row in rows]).bincount(minlength=300) for rows in (once, again)]
    # Only the tail after the last full row may differ.
    assert (counts[0] - counts[1]).abs().sum() < 2 * LENGTH


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_steps_share_their_rows(documents, tokenizer, processes):
    rows = take(packed(documents, tokenizer), 24)
    for process in range(processes):
        steps = step_rows(packed(documents, tokenizer), 6, 2, process=process, processes=processes)
        with contextlib.closing(steps):
            for number, step in enumerate(take(steps, 4)):
                whole = rows[6 * number : 6 * number + 6]
                own = whole[process::processes]
                assert [len(batch["labels"]) for batch in step.batches] == [2] * (len(own) // 2) + [1] * (len(own) % 2)
                joined = {name: torch.cat([batch[name] for batch in step.batches]) for name in own[0]}
                assert same([joined], [collate_rows(own)])
                assert step.labels == count_labels(whole)


@pytest.mark.parametrize("taken", [1, 3, 40])
def test_steps_continue_at_their_position(documents, tokenizer, taken):
    whole = step_rows(MixedRows(packed(documents, tokenizer), extra_rows, 0.3), 5, 5)
    with contextlib.closing(whole):
        steps = take(whole, taken + 6)
    again = MixedRows(packed(documents, tokenizer), extra_rows, 0.3)
    again.load_state_dict(json.loads(json.dumps(steps[taken - 1].position)))
    with contextlib.closing(step_rows(again, 5, 5)) as continued:
        assert same([step.batches[0] for step in take(continued, 6)], [step.batches[0] for step in steps[taken:]])


def test_steps_pass_errors_on(tokenizer):
    with (
        pytest.raises(DataError, match="fewer than one row of 31"),
        contextlib.closing(step_rows(packed(["abc"], tokenizer), 2, 2)) as steps,
    ):
        next(steps)


def test_other_data_is_refused(documents, tokenizer):
    state = packed(documents, tokenizer).state_dict()
    with pytest.raises(DataError, match="documents 16, this run has 15"):
        packed(documents[1:], tokenizer).load_state_dict(state)
    with pytest.raises(DataError, match="seed 5, this run has 6"):
        packed(documents, tokenizer, seed=6).load_state_dict(state)


def test_too_little_text(tokenizer):
    with pytest.raises(DataError, match="the 2 documents hold 9 tokens, fewer than one row of 31"):
        next(iter(packed(["abc", "xy"], tokenizer)))


def test_rows_longer_than_a_block(documents, tokenizer):
    rows = PackedRows(documents, tokenizer, 1500, block_tokens=10, epochs=1)
    assert len(list(rows)) >= 3
    with pytest.raises(DataError, match="fewer than one row of 50000"):
        next(iter(PackedRows(documents, tokenizer, 50_000, block_tokens=10)))


def test_documents_shorter_than_a_row_and_blank_ones(tokenizer):
    rows = list(packed(["abc", " ", ""] * 40, tokenizer, epochs=1))
    assert len(rows) == 40 * 5 // LENGTH
    assert max(int(row["position_ids"].max()) for row in rows) == 4


def test_a_document_that_is_no_text(tokenizer):
    with pytest.raises(DataError, match="text is 7, not a string"):
        next(iter(packed(["abc", 7], tokenizer)))
