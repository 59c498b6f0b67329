"""Commands in the headers of configs and in the pages are understood by the recipes that they start."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from tiny_run import RECIPES, ROOT

from hf_sparse_attention import arguments

CONFIGS = sorted((RECIPES / "configs").glob("*/*.yaml"))
PAGES = [RECIPES / "README.md", *sorted((ROOT / "model_cards" / "results").glob("*/README.md"))]
# They want a GPU as soon as they have their options, and have their commands without any.
ON_A_GPU = ("benchmark_attention.py", "benchmark_model.py")


def commands(path: Path) -> list[list[str]]:
    """Words, from the recipe on, of every command that starts one: in a config's comments, or indented in a page."""
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^# ?(.*)$" if path.suffix == ".yaml" else r"^ {4,}(.*)$", text, re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    started = re.findall(r"^ *(?:\w+=\S+ )*(?:accelerate|python) .*?(recipes/\w+\.py.*)$", joined, re.MULTILINE)
    return [shlex.split(command, comments=True) for command in started]


class Parsed(Exception):
    pass


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def parse_only(*types, argv=None, description=None):
        arguments.parse(*types, argv=words[1:])
        raise Parsed

    monkeypatch.setattr(arguments, "parse_arguments", parse_only)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_header(path, monkeypatch):
    found = commands(path)
    assert found
    for words in found:
        check(words, monkeypatch)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).parent.as_posix() + "/" + path.stem)
def test_page(path, monkeypatch):
    found = commands(path)
    assert found
    for words in found:
        if Path(words[0]).name not in ON_A_GPU:
            check(words, monkeypatch)


def test_the_page_of_the_recipes_names_all_of_them():
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    scripts = [path.name for path in RECIPES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert [name for name in scripts if name not in page] == []
    # Those of models, and the short ones of the synthetic tasks, are named together.
    assert "`model/*.yaml`" in page
    assert "`*_short`" in page
    single = [path.stem for path in CONFIGS if path.parent.name != "model" and not path.stem.endswith("_short")]
    assert [name for name in single if not re.search(rf"/{name}\.yaml|`{name}(\.yaml)?`", page)] == []


def test_the_page_of_the_recipes_names_no_other():
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:train|model|accelerate|eval|synthetic|configs)/[\w/]+\.yaml)`", page)
    assert named
    assert [name for name in named if not (RECIPES / "configs" / name.removeprefix("configs/")).is_file()] == []
