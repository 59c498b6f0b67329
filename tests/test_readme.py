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


def test_numbers_of_the_language_models():
    """README's paragraph, sentence by sentence: perplexities at 1x, 8x and 32x, and needles at 8x."""
    runs = json.loads((RESULTS / "real_text" / "real_text.json").read_text(encoding="utf-8"))["runs"]

    def perplexity(label: str, *multiples: int) -> list[str]:
        found = runs[label.split("+")[0]]["perplexity"]["checkpoints"][label]["by_length"]
        return [f"{found[str(1024 * multiple)]['perplexity']:.1f}" for multiple in multiples]

    ours, nape, alibi, rope, yarn = (
        f"{name}_s0{scaling}"
        for name, scaling in (
            ("asentmax_nape_alibi3", ""),
            ("softmax_nape", ""),
            ("softmax_nape_alibi2", ""),
            ("softmax_rope", ""),
            ("softmax_rope", "+yarn"),
        )
    )
    sentences = [
        "perplexity {} at that length, {} at 8x and {} at 32x".format(*perplexity(ours, 1, 8, 32)),
        "softmax with NAPE {}, {} and {}".format(*perplexity(nape, 1, 8, 32)),
        "({}, {} and {} with ALiBi on all heads of the first two layers)".format(*perplexity(alibi, 1, 8, 32)),
        "softmax with RoPE {}, with YaRN {} at 8x".format(*perplexity(rope, 1), *perplexity(yarn, 8)),
        "perplexity grows to {} at 8x".format(*perplexity("asentmax_nape_s0", 8)),
    ]
    recall = next(part for part in runs[ours]["needle"] if 8192 in part["protocol"]["lengths"])
    column = recall["protocol"]["lengths"].index(8192)
    grids = recall["checkpoints"][ours]["recall"]
    found = [
        sum(row[column] for row in grids[task]) / len(grids[task]) for task in ("s_niah_1", "s_niah_2", "s_niah_3")
    ]
    sentences.append("{:.0f}, {:.0f} and {:.0f} % of the needles".format(*(100 * share for share in found)))
    text = " ".join(README.split())
    assert [sentence for sentence in sentences if sentence not in text] == []


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
