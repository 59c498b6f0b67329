"""Row visibility from transformers' arguments: ranges where they suffice, one computation per forward, no cycles."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from hf_sparse_attention.masks import sparse_attention_mask, visibility

QUERY = torch.zeros(1, 2, 6, 4)
NOTHING = {"is_causal": True, "sliding_window": None, "position_ids": None, "cu_seqlens": None, "seq_idx": None}


def generated(padding):
    """The mask that transformers makes for one row of 6 tokens with this padding."""
    return sparse_attention_mask(
        batch_size=1, q_length=6, kv_length=6, attention_mask=torch.tensor([padding]).bool(), device=QUERY.device
    )


def test_padding_becomes_ranges():
    rows = visibility(generated([0, 0, 1, 1, 1, 1]), QUERY, 6, **NOTHING)
    assert rows.attention_mask is None
    assert rows.key_end[0, 2:].tolist() == [3, 4, 5, 6]
    assert rows.key_start[0, 2:].tolist() == [2] * 4
    assert rows.visible_keys[0, 0].tolist() == [0, 0, 1, 2, 3, 4]


def test_holes_keep_the_mask_and_count_tokens():
    mask = generated([1, 1, 0, 0, 1, 1])
    rows = visibility(mask, QUERY, 6, **NOTHING)
    assert torch.equal(rows.attention_mask, mask.bool())
    assert rows.visible_keys[0, 0].tolist() == [1, 2, 2, 2, 3, 4]
    assert rows.query_positions[0, 4:].tolist() == [2, 3]
    assert rows.key_positions[0].tolist() == [0, 1, 1, 1, 2, 3]


def test_every_layer_is_handed_the_same_rows_until_the_mask_changes():
    mask = generated([0, 1, 1, 1, 1, 1])
    first = visibility(mask, QUERY, 6, **NOTHING)
    assert visibility(mask, QUERY, 6, **NOTHING) is first
    mask[0, 0, :, 1] = False
    assert visibility(mask, QUERY, 6, **NOTHING).visible_keys[0, 0].tolist() == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("padding", [[0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]], ids=["ranges", "holes"])
def test_a_mask_is_freed_with_its_last_user(padding):
    gc.disable()
    try:
        mask = generated(padding)
        visibility(mask, QUERY, 6, **NOTHING)
        alive = weakref.ref(mask)
        del mask
        assert alive() is None
    finally:
        gc.enable()


def test_inference_mode():
    with torch.inference_mode():
        mask = generated([0, 1, 1, 1, 1, 1])
        positions = torch.arange(6)[None]
        rows = visibility(mask, QUERY, 6, **{**NOTHING, "position_ids": positions})
    assert rows.visible_keys[0, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("boundaries", "expected"),
    [
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]])}, [0, 0, 2, 2, 2, 5]),
        ({"cu_seqlens": torch.tensor([0, 2, 5, 6])}, [0, 0, 2, 2, 2, 5]),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2]])}, [0, 0, 2, 2, 2, 5]),
        ({"position_ids": torch.tensor([[7, 8, 9, 10, 11, 12]])}, [0, 0, 0, 0, 0, 0]),
    ],
    ids=["position_ids", "cu_seqlens", "seq_idx", "one document from position 7"],
)
@pytest.mark.parametrize("window", [None, 2])
def test_document_starts(boundaries, expected, window):
    rows = visibility(None, QUERY, 6, **{**NOTHING, **boundaries, "sliding_window": window})
    starts = [max(s, i + 1 - (window or 6)) for i, s in enumerate(expected)]
    assert rows.key_start[0].tolist() == starts
    assert rows.visible_keys[0, 0].tolist() == [i + 1 - s for i, s in enumerate(starts)]


def test_packed_documents_without_causality_are_refused():
    arguments = {**NOTHING, "is_causal": False, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with pytest.raises(ValueError, match="packed documents with bidirectional attention"):
        visibility(None, QUERY, 6, **arguments)


STOPS = """
import sys

import torch

from hf_sparse_attention.masks import check_key_boundaries, sparse_attention_mask, visibility

device, backend, case = sys.argv[1:]
torch.set_default_device(device)
query = torch.zeros(1, 2, 6, 4)
causal = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))


def generated(*padding):
    mask = torch.tensor([padding]).bool()
    return sparse_attention_mask(batch_size=1, q_length=6, kv_length=6, attention_mask=mask, device=query.device)


def visible_keys(mask=None, positions=None, bounds=None, cu_seqlens=None):
    check_key_boundaries(torch.tensor([0, 2, 6]), bounds)
    is_causal = mask is not None or cu_seqlens is not None
    rows = visibility(mask, query, 6, is_causal=is_causal, position_ids=positions, cu_seqlens=cu_seqlens, **nothing)
    return rows.visible_keys


nothing = {"sliding_window": None, "seq_idx": None}
right, wrong = {
    "biases": ({"mask": causal}, {"mask": causal + 0.5}),
    "documents": ({"positions": torch.arange(6)[None]}, {"positions": torch.tensor([[0, 1, 2, 0, 1, 2]])}),
    "boundaries": ({"bounds": torch.tensor([0, 2, 6])}, {"bounds": torch.tensor([0, 3, 6])}),
    "rest": ({"cu_seqlens": torch.tensor([0, 2, 6])}, {"cu_seqlens": torch.tensor([0, 2, 4])}),
    "holes": ({"mask": generated(0, 1, 1, 1, 1, 1)}, {"mask": generated(1, 1, 0, 0, 1, 1)}),
}[case]
compiled = torch.compile(visible_keys, fullgraph=True, backend=backend)
print(compiled(**right).tolist())
print(compiled(**wrong).tolist())
"""
# Visible keys of the right call, and how the message about the wrong one begins.
STOPPED = {
    "biases": ([1, 2, 3, 4, 5, 6], "the 4-D attention_mask holds values other than 0 and a large negative number"),
    "documents": ([6] * 6, "packed documents with bidirectional attention need a 4-D attention_mask"),
    "boundaries": ([6] * 6, "cu_seq_lens_k differs from cu_seq_lens_q"),
    "rest": ([1, 2, 1, 2, 3, 4], "cu_seq_lens_q must ascend from 0 to the number of tokens in the row"),
    "holes": ([0, 1, 2, 3, 4, 5], "attention_mask hides tokens between visible ones"),
}


@pytest.mark.parametrize(
    ("device", "backend", "case"),
    [
        ("cpu", "eager", "biases"),
        ("cpu", "aot_eager", "biases"),
        ("cpu", "aot_eager", "documents"),
        ("cpu", "aot_eager", "boundaries"),
        ("cpu", "aot_eager", "rest"),
        *(
            pytest.param("cuda", backend, case, marks=pytest.mark.gpu)
            for backend, case in (
                ("eager", "biases"),
                ("aot_eager", "biases"),
                ("inductor", "biases"),
                ("inductor", "documents"),
                ("inductor", "boundaries"),
                ("inductor", "rest"),
                ("inductor", "holes"),
            )
        ),
    ],
)
def test_compiled_code_stops_at_values_it_cannot_support(forked, device, backend, case):
    """In a process of its own: on a GPU an assertion fails in a kernel, and the process can use the GPU no more."""
    if device == "cpu":
        done = forked(STOPS, device, backend, case)
    else:
        # A fork cannot use the GPU if its parent has looked for one.
        command = [sys.executable, "-c", STOPS, device, backend, case]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    visible, message = STOPPED[case]
    assert done.returncode != 0, done.stdout
    assert done.stdout.splitlines()[-1:] == [str([[visible]])], done.stderr
    assert {"cpu": "RuntimeError: ", "cuda": "Assertion `"}[device] + message in done.stderr, done.stderr
