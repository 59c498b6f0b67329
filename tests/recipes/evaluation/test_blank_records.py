"""Records without text are blank documents for every recipe that reads text."""

import json
import sys

import analyze
import needle
import perplexity
import pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory, essay):
    """The same texts with and without blank records among them."""
    folder = tmp_path_factory.mktemp("blank")
    texts = [essay[:700], essay[3000:3900]]
    for name, records in (("full", texts), ("blank", [None, texts[0], "", None, texts[1]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    return folder / "full.jsonl", folder / "blank.jsonl"


@pytest.fixture
def run(monkeypatch, tmp_path, asentmax_checkpoint):
    def run(recipe, *flags):
        words = [recipe.__file__, "--models", asentmax_checkpoint, "--output_dir", tmp_path, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        recipe.main()
        name = "analysis" if recipe is analyze else recipe.__name__
        content = json.loads((tmp_path / f"{name}.json").read_text())
        return next(iter(content["checkpoints"].values()))

    return run


def test_perplexity(run, files):
    results = [run(perplexity, "--data", file, "--lengths", 16, 40)["by_length"] for file in files]
    for length in ("16", "40"):
        assert results[0][length]["loss"] == pytest.approx(results[1][length]["loss"])


def test_analyze(run, files):
    results = [run(analyze, "--data", file, "--max_length", 40) for file in files]
    assert results[0] == results[1]


def test_needle(run, files, tmp_path):
    flags = ["--tasks", "s_niah_2", "--lengths", 90, "--samples", 1, "--wording", "short", "--decoding", "forced"]
    for file in files:
        assert (
            len(run(needle, "--haystack", file, *flags, "--cache_dir", tmp_path / "cache")["recall"]["s_niah_2"]) == 5
        )
