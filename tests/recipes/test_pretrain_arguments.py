"""Options from YAML and flags: what is wrong is named, nothing is silently ignored."""

import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml
from analyze import AnalyzeArguments
from finetune import FinetuneOptions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from needle import NeedleArguments
from perplexity import PerplexityArguments
from pretrain_options import DataOptions, ModelOptions, RunOptions
from pretrain_setup import read_model_config

from hf_sparse_attention.arguments import ArgumentError, parse, parse_arguments, parse_mapping


def _help(text: str, **more):
    return {"help": text, **more}


@dataclass
class Options:
    files: list[str] = field(metadata=_help("required"))
    steps: int = field(default=3, metadata=_help("a number"))
    rate: float = field(default=1e-3, metadata=_help("a number"))
    enabled: bool = field(default=True, metadata=_help("a switch"))
    name: str | None = field(default=None, metadata=_help("a text"))
    kind: Literal["a", "b"] = field(default="a", metadata=_help("a choice"))
    fields: dict | str | None = field(default=None, metadata=_help("a mapping", metavar="JSON"))

    def __post_init__(self):
        self.fields = parse_mapping("fields", self.fields)


def from_yaml(tmp_path, text, *flags):
    path = tmp_path / "options.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse(Options, argv=[str(path), *flags])[0]


def test_types(tmp_path):
    text = (
        "files: [a, b]\nsteps: 5\nrate: 2e-4\nenabled: false\nname: x\nkind: b\nfields: {alpha: 1.5, to: [1, null]}\n"
    )
    options = from_yaml(tmp_path, text)
    wanted = (["a", "b"], 5, 2e-4, False, "x", "b", {"alpha": 1.5, "to": [1, None]})
    assert tuple(vars(options).values()) == wanted


def test_flags_override_the_file(tmp_path):
    options = from_yaml(tmp_path, "files: a\nsteps: 5\nname: null\n", "--steps", "7", "--fields", '{"x": 1}')
    assert (options.files, options.steps, options.name, options.fields) == (["a"], 7, None, {"x": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("files: a\nstep: 5", "unknown option 'step' .value 5.. Did you mean 'steps'"),
        ("files: a\nsteps: five", "options.yaml: steps: invalid int value: 'five'"),
        ("files: a\nsteps: 5.5", "options.yaml: steps: invalid int value: '5.5'"),
        ("files: a\nsteps: true", "options.yaml: steps: True is true or false"),
        ("files: a\nsteps: [5]", "options.yaml: steps: takes one value, got a list"),
        ("files: a\nsteps: null", "options.yaml: steps: null is not allowed"),
        ("files: a\nenabled: maybe", "options.yaml: enabled: .*maybe"),
        ("files: a\nkind: c", "options.yaml: kind: invalid choice: 'c'"),
        ("files: a\nname: {x: 1}", "options.yaml: name: takes one value, got a mapping"),
        ("files: a\nname: 2020-02-02", "options.yaml: name: .* is a date, put it in quotes"),
        ("files: [[a]]", "options.yaml: files: .* is not a list of values"),
        ("files: a\nfields: 3", "fields: '3' is not a JSON object"),
        ("files: a\nfiles: b", "options.yaml: not valid YAML: .*'files' given twice"),
        ("files: [a", "options.yaml: not valid YAML"),
        ("- files", "options.yaml: expected 'name: value' lines, got a list"),
        (b"\xff\xfe\x00\x01", "options.yaml: not a text file"),
        ("steps: 5", "the following arguments are required: --files"),
    ],
    ids=lambda value: value[-24:] if isinstance(value, str) and " " not in value[-24:] else "",
)
def test_wrong_files(tmp_path, text, message):
    with pytest.raises(ArgumentError, match=message):
        from_yaml(tmp_path, text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--files", "a", "--step", "5"], r"unknown option: \['--step', '5'\]"),
        (["--files", "a", "--steps", "x"], "steps: invalid int value"),
        (["--files", "a", "--fields", "{"], "fields: '{' is not a JSON object"),
        (["no.yaml"], "no.yaml: No such file"),
    ],
    ids=["unknown", "type", "json", "missing-file"],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ArgumentError, match=message):
        parse(Options, argv=flags)


def test_the_program_says_it_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", "--steps", "x"])
    with pytest.raises(SystemExit) as leaving:
        parse_arguments(Options)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "train.py: error: steps: invalid int value: 'x'\n"


REQUIRED = ["--model_config", "m.yaml", "--train_data", "t.txt", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length", "1"], "length is 1; allowed: at least 2"),
        (["--max_steps", "0"], "max_steps is 0; allowed: at least 1"),
        (["--learning_rate", "nan"], "learning_rate is nan; allowed: above 0"),
        (["--final_learning_rate", "1"], "final_learning_rate is 1.0; allowed: 0 to learning_rate"),
        (["--weight_decay", "-1"], "weight_decay is -1.0"),
        (["--adam_beta2", "1"], "adam_beta2 is 1.0"),
        (["--retrieval_fraction", "1"], "retrieval_fraction is 1.0"),
        (["--retrieval_weight", "2"], "retrieval_weight: there are no retrieval rows; give retrieval_fraction"),
        (["--retrieval_weight", "0"], "retrieval_weight is 0.0; allowed: above 0"),
        (["--alpha_start", "2.5"], "alpha_start is 2.5; allowed: 1 to 2"),
        (["--model_name_or_path", "x"], "exactly one of model_config and model_name_or_path"),
        (["--push_to_hub"], "hub_model_id is not given"),
        (["--schedule", "linear"], "schedule: invalid choice"),
        (["--decay_steps", "2000"], "decay_steps is 2000"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_ranges(flags, message):
    with pytest.raises(ArgumentError, match=message):
        parse(ModelOptions, DataOptions, RunOptions, argv=[*REQUIRED, *flags])


def test_schedules():
    def rates(**changes):
        options = RunOptions(output_dir="o", max_steps=20, warmup_steps=4, learning_rate=1.0, **changes)
        return [options.learning_rate_factor(step) for step in range(20)]

    cosine = rates(schedule="cosine", final_learning_rate=0.1)
    assert cosine[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert cosine[12] == pytest.approx(0.55)
    assert sorted(cosine[4:], reverse=True) == cosine[4:]
    assert 0.1 < cosine[-1] < 0.12
    wsd = rates(schedule="wsd", decay_steps=5, final_learning_rate=0.0)
    assert wsd[4:16] == [1.0] * 12
    assert wsd[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(schedule="constant")[4:] == [1.0] * 16
    # A decay that begins within the warmup: no step above both lines, and no jump.
    early = rates(schedule="wsd", decay_steps=18, final_learning_rate=0.0)
    assert early[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 16 / 18])
    assert max(abs(after - before) for before, after in itertools.pairwise(early)) <= 0.2 + 1e-9


def test_every_option_has_help():
    for dtype in (ModelOptions, DataOptions, RunOptions):
        for entry in dataclasses.fields(dtype):
            assert len(entry.metadata["help"]) > 3, entry.name


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.dates())
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3))


def as_given(value, option):
    """What a file says, in the form that an option of this value has."""
    if isinstance(option, list):
        return [type(option[0])(item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(option, dict):
        return json.loads(value) if isinstance(value, str) else json.loads(json.dumps(value))
    if isinstance(option, bool):
        return str(value).lower() in ("true", "yes", "y", "t", "1")
    return type(option)(value)


def equal(one, other):
    return one == other or one != one  # NaN


RECIPES = {
    "pretrain": (ModelOptions, DataOptions, RunOptions),
    "finetune": (FinetuneOptions, DataOptions, RunOptions),
    "perplexity": (PerplexityArguments,),
    "needle": (NeedleArguments,),
    "analyze": (AnalyzeArguments,),
}
REQUIRED_BY = {
    "pretrain": REQUIRED,
    "finetune": ["--model_name_or_path", "m", "--train_data", "t.txt", "--output_dir", "o"],
    "perplexity": ["--models", "m", "--data", "t.txt"],
    "needle": ["--models", "m"],
    "analyze": [],
}


@pytest.mark.parametrize("recipe", RECIPES)
@settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_file_is_kept_or_refused(tmp_path, recipe, data):
    """Never a traceback from deep inside, never a silent default."""
    dtypes, flags = RECIPES[recipe], REQUIRED_BY[recipe]
    known = [entry.name for dtype in dtypes for entry in dataclasses.fields(dtype)]
    names = st.sampled_from(known) | st.text(max_size=9)
    content = data.draw(st.dictionaries(names, values, max_size=4) | st.text(max_size=40))
    path = tmp_path / "fuzz.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        parsed = parse(*dtypes, argv=[str(path), *flags])
    except ArgumentError:  # the only error that may come out
        return
    options = {name: value for part in parsed for name, value in vars(part).items()}
    for name, value in content.items() if isinstance(content, dict) else ():
        if f"--{name}" not in flags and value is not None:
            assert equal(options[name], as_given(value, options[name])), name


architecture = st.dictionaries(
    st.sampled_from(["model_type", "hidden_size", "num_attention_heads", "rope_parameters", "vocab_size", "tie_word"])
    | st.text(max_size=6),
    values | st.sampled_from(["llama", "gpt_neox", 32, 64]),
    max_size=4,
)


@settings(
    deadline=None, max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fields=architecture, changes=architecture)
def test_any_architecture_is_kept_or_refused(tmp_path, fields, changes):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"model_type": "llama", **fields}), encoding="utf-8")
    try:
        config = read_model_config(ModelOptions(model_config=str(path), model_overrides=changes))
    except ArgumentError:
        return
    for name, value in {"model_type": "llama", **fields, **changes}.items():
        assert equal(getattr(config, name), value) or name == "rope_parameters", name
