"""The same tokens give the same logits, whatever surrounds them and however they arrive."""

import pytest
import torch
from families import CACHE, FAMILIES, alone, assert_same, packed, padded, prompts, tiny_model
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from hf_sparse_attention import PRESETS

POSITIONS = ("model", "nape", "alibi", "nope")
CASES = [pytest.param({"preset": p, "position": e}, id=f"{p}-{e}") for p in PRESETS for e in POSITIONS]
HEADS = [pytest.param({"num_key_value_heads": 2}, id="gqa"), pytest.param({"num_key_value_heads": 6}, id="mha")]
FAMILY_CASES = [pytest.param({"family": f, "position": e}, id=f"{f}-{e}") for f in FAMILIES for e in ("model", "nape")]


def check_batches(model):
    """Left-padded, right-padded and packed rows, boundaries given in every way that transformers has."""
    rows = prompts(9, 5, 13)
    expected = [alone(model, row) for row in rows]
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = padded(rows, side)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            for name, extra in {"default positions": {}, "position_ids": {"position_ids": positions}}.items():
                logits = model(ids, attention_mask=mask, use_cache=False, **extra).logits
                for row in range(len(rows)):
                    assert_same(logits[row][mask[row].bool()], expected[row], f"{side}-padded, {name}, row {row}")
        ids, positions = packed(rows)
        bounds = torch.tensor([0, 9, 14, 27], dtype=torch.int32)
        flattened = {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": 13,
            "max_length_k": 13,
        }
        collated = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")(
            [{"input_ids": row.tolist()} for row in rows]
        )
        logits = model(**{name: value for name, value in collated.items() if name != "labels"}).logits[0]
        assert_same(logits, torch.cat(expected), "packed by the flattening collator")
        assert_same(model(ids, **flattened).logits[0], torch.cat(expected), "packed, cu_seq_lens alone")
        ways = {
            "position_ids": {"use_cache": False},
            "position_ids with a cache": {"use_cache": True},
            "position_ids with an all-ones mask": {"attention_mask": torch.ones_like(ids), "use_cache": False},
            "cu_seq_lens": {**flattened, "use_cache": False},
            "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor([9, 5, 13]))[None]},
        }
        for name, extra in ways.items():
            logits = model(ids, position_ids=positions, **extra).logits[0]
            assert_same(logits, torch.cat(expected), f"packed, {name}")


def check_caches(model):
    """One prefill, chunks and single tokens, on every kind of cache."""
    (row,) = prompts(9)
    expected = alone(model, row)
    makers = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=12),
    }
    splits = {"one prefill": [9], "chunks": [4, 3, 2], "tokens": [1] * 9}
    with torch.no_grad():
        for cache_name, make in makers.items():
            for split_name, sizes in splits.items():
                cache, logits, seen = make(), [], 0
                for chunk in row.split(sizes):
                    positions = torch.arange(seen, seen + len(chunk))[None]
                    logits.append(model(chunk[None], **{CACHE: cache}, position_ids=positions).logits[0])
                    seen += len(chunk)
                assert_same(torch.cat(logits), expected, f"{cache_name} cache, {split_name}")


def check_padded_generation(model):
    """Greedy generation from a padded batch equals step-by-step argmax of each prompt alone."""
    rows = prompts(7, 4)
    ids, mask = padded(rows, "left")
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    for row, prompt in enumerate(rows):
        tokens = prompt
        for _ in range(3):
            tokens = torch.cat([tokens, alone(model, tokens)[-1].argmax()[None]])
        assert generated[row, -3:].tolist() == tokens[-3:].tolist(), f"row {row}"


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_presets(case, heads):
    model = tiny_model(**case, **heads)
    check_batches(model)
    check_caches(model)
    check_padded_generation(model)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_families(case):
    model = tiny_model(**case)
    check_batches(model)
    check_caches(model)
    check_padded_generation(model)


@pytest.mark.parametrize("position", POSITIONS)
def test_padding_between_prompt_and_new_tokens(position):
    """Right padding leaves a hole in the cache that counts neither as a key nor as distance."""
    model = tiny_model(position=position)
    rows = prompts(9, 5)
    ids, mask = padded(rows, "right")
    new = prompts(3, 3)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))[CACHE]
        mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
        positions = (mask.cumsum(-1) - 1)[:, -3:]
        logits = model(torch.stack(new), attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits
    for row in range(2):
        expected = alone(model, torch.cat([rows[row], new[row]]))[-3:]
        assert_same(logits[row], expected, f"row {row}")


@pytest.mark.parametrize("number", ["previous", 0, 1])
def test_positions_of_padding_between_tokens(number):
    """Whatever number padding has, as in ``generate`` (1), the tokens after it go on with their document."""
    model = tiny_model(position="nape")
    first, second = prompts(5, 4)
    row = torch.cat([first, second])
    ids = torch.cat([first, torch.zeros(3, dtype=torch.long), second])[None]
    mask = torch.tensor([[1] * 5 + [0] * 3 + [1] * 4])
    positions = mask.cumsum(-1) - 1
    if number != "previous":
        positions = positions.masked_fill(mask == 0, number)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    assert_same(logits[mask[0].bool()], alone(model, row), "one forward")
    options = {"max_new_tokens": 3, "do_sample": False}
    new = model.generate(ids, attention_mask=mask, **options)[0, -3:]
    assert new.tolist() == model.generate(row[None], **options)[0, -3:].tolist()


def test_padded_row_of_packed_documents():
    """Documents stay apart in a row that has padding too, where transformers' mask drops their boundaries."""
    model = tiny_model(position="nape")
    rows = prompts(6, 7)
    ids, positions = packed(rows)
    ids, positions = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(positions, (0, 3))
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, :13]
    assert_same(logits, torch.cat([alone(model, row) for row in rows]), "packed and padded")


def test_own_4d_masks():
    """A user's 4-D mask, bool or float, is taken as it is."""
    model = tiny_model()
    rows = prompts(4, 6)
    ids, positions = packed(rows)
    document = torch.repeat_interleave(torch.arange(2), torch.tensor([4, 6]))
    visible = (document[:, None] == document) & torch.ones(10, 10, dtype=torch.bool).tril()
    expected = torch.cat([alone(model, row) for row in rows])
    as_float = torch.zeros(1, 1, 10, 10).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        for mask in (visible[None, None], as_float):
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
            assert_same(logits, expected, str(mask.dtype))


def test_tree_mask_is_not_cut_at_position_restarts():
    """Two continuations of one prefix in one row, as in speculative decoding: positions repeat, the mask decides."""
    model = tiny_model()
    prefix, first, second = prompts(5, 2, 2)
    ids = torch.cat([prefix, first, second])[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 5, 6]])
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[7:, 5:7] = False
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(ids, attention_mask=visible[None, None], position_ids=positions, **{CACHE: cache}).logits[0]
        assert_same(logits[7:], alone(model, torch.cat([prefix, second]))[-2:], "second branch")
        # Another token of the first branch, after the second was rejected.
        cache.crop(-2)
        logits = model(prefix[None, :1], position_ids=torch.tensor([[7]]), **{CACHE: cache}).logits[0]
    assert_same(logits, alone(model, torch.cat([prefix, first, prefix[:1]]))[-1:], "going on with the first branch")
