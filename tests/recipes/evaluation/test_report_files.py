"""The JSON files that the recipes write."""

import json
import math

from hf_sparse_attention.evaluation.report import write_json


def test_lists_of_numbers_take_one_line(tmp_path):
    file = tmp_path / "folder" / "results.json"
    content = {"text": 'a [\n1,\n2\n] " b', "curve": [[1, 0.5], [2, -1e-9]], "no": [], "flags": [True, None]}
    write_json(file, content)
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "    [1, 0.5],\n    [2, -1e-09]\n" in text
    assert '"flags": [true, null]' in text


def test_what_json_has_no_number_for_is_null(tmp_path):
    write_json(tmp_path / "results.json", {"losses": [math.inf, math.nan, 1.0], "one": -math.inf})
    assert json.loads((tmp_path / "results.json").read_text()) == {"losses": [None, None, 1.0], "one": None}
