"""The numbers that README shows are those of the committed results."""

import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

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
    measured = json.loads((RESULTS / "benchmark_attention.json").read_text(encoding="utf-8"))["training"]
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


def test_comparison_with_adasplash():
    measured = json.loads((RESULTS / "benchmark_attention.json").read_text(encoding="utf-8"))["training"]
    rows = [row for row in measured if row["head_dim"] == 64 and row["length"] == 16384]
    rows = {(row["contestant"], row["empty_asked"]): row for row in rows}

    def ratio(other: str, empty: float, time: str) -> str:
        return f"{rows['ours (entmax 1.5)', empty][time] / rows[other, empty][time]:.2f}"

    adasplash, cudnn = "AdaSplash-2 (entmax 1.5)", "SDPA cuDNN (softmax)"
    assert round(rows[adasplash, 0.93]["empty_measured"], 2) == 0.9
    assert round(rows[adasplash, 0.97]["empty_measured"], 2) == 0.94
    sentences = [
        f"with 94 % of the tiles empty {ratio(adasplash, 0.97, 'sum_ms')} of AdaSplash-2 and "
        f"{ratio(cudnn, 0.97, 'sum_ms')} of cuDNN, with 90 % {ratio(adasplash, 0.93, 'sum_ms')} and "
        f"{ratio(cudnn, 0.93, 'sum_ms')}",
        f"{ratio(adasplash, 0, 'forward_ms')} (forward) and {ratio(adasplash, 0, 'backward_ms')} (backward)",
    ]
    text = " ".join(README.split())
    assert [sentence for sentence in sentences if sentence not in text] == []


def test_numbers_of_recall():
    results = json.loads((RESULTS / "synthetic" / "mqmtar_once" / "results.json").read_text(encoding="utf-8"))
    cells = {cell["length"]: cell for cell in results["evaluation"]["cells"]}
    longest = cells[65536]
    share = {length: f"{100 * cells[length]['exact_match']:.1f} %" for length in (1024, 4096, 16384)}
    sentence = (
        f"recalls pairs in {share[1024]} of the rows of 1,024 tokens, {share[4096]} of those of 4,096, {share[16384]} "
        f"of 16,384 and {round(longest['exact_match'] * longest['samples'])} of {longest['samples']} of 65,536"
    )
    assert sentence in " ".join(README.split())
    assert round(results["training"]["seconds"] / 60) == 7


def test_numbers_of_the_language_models():
    """README's paragraph, sentence by sentence: perplexities, and needles at 8x, means over seeds."""
    runs = json.loads((RESULTS / "real_text" / "real_text.json").read_text(encoding="utf-8"))["runs"]

    def of(variant: str) -> dict[str, dict[str, Any]]:
        return {name: run for name, run in runs.items() if re.fullmatch(rf"{variant}_s\d+", name)}

    def perplexity(variant: str, *multiples: int, scaling: str = "") -> list[str]:
        checkpoints = [run["perplexity"]["checkpoints"].get(name + scaling) for name, run in of(variant).items()]
        found = [checkpoint["by_length"] for checkpoint in checkpoints if checkpoint]
        return [f"{mean(seed[str(1024 * multiple)]['perplexity'] for seed in found):.1f}" for multiple in multiples]

    def needles(variant: str, task: str, length: int) -> str:
        parts = [(name, part) for name, run in of(variant).items() for part in run["needle"]]
        shares = [
            mean(row[part["protocol"]["lengths"].index(length)] for row in part["checkpoints"][name]["recall"][task])
            for name, part in parts
            if length in part["protocol"]["lengths"]
        ]
        return f"{100 * mean(shares):.0f}"

    ours = "asentmax_nape_alibi3"
    assert len(of(ours)) == len(of("softmax_rope")) == 3
    sentences = [
        "perplexity {} at that length, {} at 8x and {} at 32x (three seeds)".format(*perplexity(ours, 1, 8, 32)),
        "SSMax with NAPE {}, {} and {};".format(*perplexity("ssmax_nape", 1, 8, 32)),
        "softmax with NAPE {}, {} and {}".format(*perplexity("softmax_nape", 1, 8, 32)),
        "({}, {} and {} with ALiBi on all heads of the first two layers)".format(
            *perplexity("softmax_nape_alibi2", 1, 8, 32)
        ),
        "softmax with RoPE {} (three seeds), with YaRN {} at 8x".format(
            *perplexity("softmax_rope", 1), *perplexity("softmax_rope", 8, scaling="+yarn")
        ),
        "perplexity grows to {} at 8x".format(*perplexity("asentmax_nape", 8)),
        "{}, {} and {} % of the needles".format(*(needles(ours, f"s_niah_{i}", 8192) for i in (1, 2, 3))),
    ]
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
