"""torch.export and other dtypes."""

import pytest
import torch
from families import alone, assert_same, padded, prompts, tiny_model

BATCH, LENGTH = torch.export.Dim("batch", min=2, max=9), torch.export.Dim("length", min=4, max=100)


def exported(model, inputs, dynamic):
    shapes = {name: {0: BATCH, 1: LENGTH} if dynamic else None for name in inputs}
    program = torch.export.export(
        model, (), {**inputs, "use_cache": False}, dynamic_shapes={**shapes, "use_cache": None}, strict=False
    )
    return program, program.module()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("kind", [("llama", "asentmax", "nape"), ("gpt_neox", "ssmax", "model")], ids="-".join)
def test_export(kind, backend):
    model = tiny_model(*kind)
    model.config.sparse_attention["backend"] = backend
    inputs = {"input_ids": torch.stack(prompts(9, 9))}
    _, compute = exported(model, inputs, dynamic=False)
    assert_same(compute(**inputs, use_cache=False).logits, model(**inputs).logits, f"{kind} {backend}")


def test_export_of_any_size_saved_and_loaded(tmp_path):
    """One program for every batch size, length and left padding, run from a file."""
    model = tiny_model(position="nape")
    ids, mask = padded(prompts(6, 9), "left")
    program, _ = exported(model, {"input_ids": ids, "attention_mask": mask}, dynamic=True)
    torch.export.save(program, tmp_path / "model.pt2")
    compute = torch.export.load(tmp_path / "model.pt2").module()
    for lengths in ((9, 6), (14, 3, 21), (31, 31)):
        rows = prompts(*lengths)
        ids, mask = padded(rows, "left")
        logits = compute(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, length, actual in zip(rows, lengths, logits):
            assert_same(actual[-length:], alone(model, row), f"{lengths}: {length}")


@pytest.mark.parametrize(
    ("convert", "dtype", "tolerance"),
    [
        (lambda model: model.half(), torch.float16, 0.01),
        (lambda model: model.to(torch.bfloat16), torch.bfloat16, 0.05),
        (lambda model: model.to(torch.bfloat16).float(), torch.float32, 0.05),
        (lambda model: model.double(), torch.float64, 1e-6),
    ],
    ids=["half", "bfloat16", "bfloat16-and-back", "double"],
)
@pytest.mark.parametrize("preset", ["asentmax", "ssmax", "topk"])
def test_other_dtypes(preset, convert, dtype, tolerance):
    model = tiny_model(preset=preset, position="nape")
    (row,) = prompts(23)
    expected = alone(model, row)
    logits = alone(convert(model), row)
    assert logits.dtype == dtype
    assert (logits.double() - expected.double()).norm() < tolerance * expected.norm()
    model.generate(row[None], max_new_tokens=2, do_sample=False)
