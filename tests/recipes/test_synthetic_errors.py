"""Wrong tokens by how often what stands before them is repeated, and the recipe on a model of the checkout."""

import json

import pytest
import synthetic_errors
import torch
from tiny_run import ROOT

from hf_sparse_attention.evaluation.synthetic_errors import ContextCount, common_contexts, count_contexts

# abcXabcY: before X and before Y stand the same three symbols.
TARGET = torch.tensor([1, 2, 3, 8, 1, 2, 3, 9])


def test_common_contexts():
    contexts = common_contexts(TARGET)
    assert contexts[3, 7] == contexts[7, 3] == 3
    assert contexts[2, 6] == 2
    assert contexts[0].sum() == 0
    assert contexts[3, 6] == 0


def test_wrong_tokens_are_counted_by_ambiguity():
    predicted = TARGET.clone()
    # What follows the other place with the same context; then a symbol that follows nothing alike; then none at all.
    predicted[7], predicted[1], predicted[0] = 8, 9, 30
    counts = {}
    count_contexts(TARGET, predicted, counts)
    # Three symbols before X and Y, none of the others' contexts stands before another symbol.
    assert counts == {0: ContextCount(6, 2, 1), 3: ContextCount(2, 1, 1)}


def test_a_kept_model(tmp_path, capsys):
    output = tmp_path / "errors.json"
    model = ROOT / "model_cards" / "synthetic" / "copy"
    synthetic_errors.main(
        ["--model", str(model), "--task", "copy", "--length", "64", "--rows", "4", "--output", str(output)]
    )
    found = json.loads(output.read_text())
    assert found["right_rows"] == 4
    # 64 symbols and the end of each row.
    assert sum(count["tokens"] for count in found["contexts"].values()) == 4 * 65
    assert not any(count["wrong"] for count in found["contexts"].values())
    assert "4 of 4 rows of 64 tokens are right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "model is missing"),
        (["--model", "none", "--task", "sort"], "task is 'sort'"),
        (["--model", "none", "--rows", "0"], "rows is 0"),
        (["--model", str(ROOT / "tests")], "cannot be loaded"),
        (["--model", str(ROOT / "model_cards" / "synthetic" / "mqmtar")], "tokens, copy has 36"),
    ],
)
def test_bad_input(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        synthetic_errors.main([*flags, "--output", str(tmp_path / "errors.json")])
    assert raised.value.code not in (0, None)
    assert message in str(raised.value.code) + capsys.readouterr().err
