"""The numbers that README shows are those of the committed results."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "model_cards" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quickstart_table(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    import quickstart

    summary = quickstart.summarize(RESULTS / "quickstart")
    assert (RESULTS / "quickstart" / "summary.md").read_text(encoding="utf-8").strip() == summary
    table = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(table) == 11
    assert "\n".join(table) in README


def kernel_rows() -> list[str]:
    """Forward + backward on the H200 at 16 heads of 64, as README's table has it."""
    measured = json.loads((RESULTS / "benchmark_kernels.json").read_text(encoding="utf-8"))["training"]
    rows = {}
    for row in measured:
        if row["head_dim"] == 64 and row["key_heads"] == row["heads"] and row["length"] in (16384, 65536, 131072):
            key = row["length"], row["empty_asked"]
            rows.setdefault(key, {"empty": row["empty_measured"]})[row["contestant"]] = row["sum_ms"]
    lines = []
    for (length, _), row in sorted(rows.items()):
        ours, cudnn = row["ours (entmax 1.5)"], row.get("SDPA cuDNN (softmax)")
        if cudnn is not None:
            lines.append(f"| {length:,} | {row['empty']:.0%} | {ours:.2f} | {cudnn:.2f} | {ours / cudnn:.2f} |")
    return lines


def test_kernel_table():
    rows = kernel_rows()
    assert len(rows) >= 8
    missing = [row for row in rows if row not in README]
    assert missing == []


@pytest.mark.parametrize(
    "name", ["LICENSE", "CITATION.cff", "recipes/README.md", "model_cards/results/experiments.md"]
)
def test_files_that_readme_names_exist(name):
    assert (ROOT / name).is_file()


def test_first_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], variables)
    assert variables["model"].config._attn_implementation == "asentmax"
    assert variables["model"].config.sparse_attention["position_encoding"] == "nape"


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
