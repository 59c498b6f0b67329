"""Pushing to a Hub and loading from it, over HTTP; the code that a checkpoint carries; failing pushes."""

import builtins
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, randomize_scale, tiny_config, tiny_model
from forked import forking
from hub_server import OWNER, serving
from test_composite import gemma3, llava
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_sparse_attention import convert, revert
from hf_sparse_attention.hub import REMOTE_CODE_FILE, TrustedCheckpoint

RECIPES = Path(__file__).parents[2] / "recipes"
IDS = torch.arange(2, 19)[None]
ADAPTER = ("config.json", "model.safetensors")

# What takes long and is no part of this package.
IMPORTS = """
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, pipeline
"""

PUSH = """
import sys, torch
import warnings
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
import hf_sparse_attention
from hf_sparse_attention.modelcard import Measurement, create_model_card

folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.save_pretrained(folder)  # a loaded tokenizer notes that it was loaded
model.push_to_hub("tester/model")
tokenizer.push_to_hub("tester/model")
card = create_model_card(
    model.config, repo_id="tester/model", parameters=1, training={}, training_length=8, base_model="owner/base",
    datasets=["owner/data"], results=[Measurement("perplexity", 12.5, "text", "recipes/pretrain.py", "owner/data")],
)

def upload(text):
    # ModelCard.push_to_hub of huggingface_hub 1 validates at huggingface.co whatever the endpoint.
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="tester/model")

with warnings.catch_warnings():
    warnings.simplefilter("error")
    upload(str(card))
try:
    upload(str(card).replace("type: perplexity", "kind: perplexity"))
except ValueError as error:
    assert "Invalid metadata in README.md" in str(error) and "model-index: KeyError('type')" in str(error), error
else:
    raise AssertionError("metadata are not validated")

arguments = TrainingArguments(
    output_dir=output, hub_model_id="trained", push_to_hub=True, save_strategy="no", max_steps=1, report_to="none",
    use_cpu=True, disable_tqdm=True,
)
row = torch.arange(2, 12)
trainer = hf_sparse_attention.SparseAttentionTrainer(
    model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 8, processing_class=tokenizer
)
trainer.train()
trainer.push_to_hub()

for name in ("model", "trained"):
    loaded = AutoModelForCausalLM.from_pretrained(f"tester/{name}").eval()
    torch.save(loaded(torch.arange(2, 19)[None]).logits, f"{output}/{name}.pt")
assert AutoTokenizer.from_pretrained("tester/model")("a b")["input_ids"] == tokenizer("a b")["input_ids"]
"""

# transformers meets a missing package; the file finder of an installed one is behind this one.
WITHOUT_PACKAGE = """
import sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "hf_sparse_attention":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder)
"""

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

assert "hf_sparse_attention" not in sys.modules
name, output = sys.argv[1:]

def attempt(auto_class=AutoModelForCausalLM, **kwargs):
    try:
        return auto_class.from_pretrained(name, **kwargs).eval()
    except (ImportError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

results = {"no trust": attempt(), "refused": attempt(trust_remote_code=False)}
model = attempt(trust_remote_code=True, sparse_attention={"alpha": 1.25})
if isinstance(model, str):
    results["trust"] = model
else:
    assert "hf_sparse_attention" in sys.modules
    results["one field"] = model.config.sparse_attention
    model = attempt(trust_remote_code=True)
    torch.save(model(torch.arange(2, 19)[None]).logits, f"{output}/logits.pt")
    model.save_pretrained(f"{output}/again")
    text = pipeline("text-generation", model=name, trust_remote_code=True)
    results["text"] = text("a b c", max_new_tokens=2)[0]["generated_text"]
    head = attempt(AutoModelForSequenceClassification, trust_remote_code=True, num_labels=3)
    results["head"] = [type(head).__name__, head.config._attn_implementation]
print(json.dumps(results))
"""

# The waits between tries of huggingface_hub are left out: there is nothing to wait for.
FAILING_PUSH = """
import sys, time
time.sleep = lambda seconds: None
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, TrainingArguments
import hf_sparse_attention
folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
try:
    model.save_pretrained(f"{output}/model", push_to_hub=True, repo_id="tester/model")
except HfHubHTTPError as error:
    print(error)
arguments = TrainingArguments(f"{output}/trainer", hub_model_id="tester/trainer", push_to_hub=True, use_cpu=True)
hf_sparse_attention.SparseAttentionTrainer(model, arguments).push_to_hub()
print("pushed")
"""

RECIPE = """
import sys, time
time.sleep = lambda seconds: None
sys.path.insert(0, sys.argv.pop(1))
import finetune
import pretrain
tuned = sys.argv.pop()
options = [*sys.argv[1:], "--max_steps", "1", "--batch_size", "1", "--device_batch_size", "1", "--length", "8"]
options += ["--warmup_steps", "0", "--resume", "latest", "--push_to_hub", "--hub_model_id"]
pretrain.main([*options, "tester/good-run"])
for name in ("broken-run", "silent-run"):
    try:
        pretrain.main([*options, f"tester/{name}"])
    except SystemExit as leaving:
        assert leaving.code == 1
    else:
        raise AssertionError(f"{name} was pushed")
finetune.main([*options, "tester/tuned", "--output_dir", tuned, "--lora_rank", "2"])
"""


def results_of(process):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def imported(file, monkeypatch):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    return module


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def saved_model(folder, **kwargs):
    """A tiny model and a tokenizer of its vocabulary in a folder; returns the model's logits."""
    model = tiny_model(**kwargs)
    words = ["<pad>", "<s>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return model(IDS).logits.detach()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A Hub, and what runs programs that talk to it."""
    folder = tmp_path_factory.mktemp("hub")
    with serving(folder) as server:
        environment = {**server.environment(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
        with forking(IMPORTS, folder, environment) as run:
            yield server, run


@pytest.fixture
def hub(served):
    """A Hub without repositories; nothing of it is in the cache of its clients."""
    server, _ = served
    for folder in (OWNER, "home"):
        shutil.rmtree(server.folder / folder, ignore_errors=True)
    server.requests.clear()
    server.faults = {}
    return server


@pytest.fixture
def run(served):
    """Runs a program in a process that has not imported the package."""
    return served[1]


@pytest.fixture
def checkpoint(tmp_path):
    """Folder and logits of a saved model."""
    return tmp_path / "local", saved_model(tmp_path / "local", position="nape")


def test_push_and_load(hub, run, checkpoint, tmp_path):
    folder, expected = checkpoint
    output = tmp_path / "trained"
    process = run(PUSH, folder, output)
    assert process.returncode == 0, process.stderr
    pushed, local = hub.files("tester/model"), contents(folder)
    assert set(pushed) == {*local, "README.md"}
    assert {name: pushed[name] for name in local} == local
    assert b"import hf_sparse_attention" in pushed["README.md"]
    assert ("POST", "/api/validate-yaml") in hub.requests
    assert torch.equal(torch.load(output / "model.pt", weights_only=True), expected)

    trained, local = hub.files("tester/trained"), contents(output)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", REMOTE_CODE_FILE} <= set(trained)
    assert all(local[name] == content for name, content in trained.items() if name != ".gitattributes")
    assert [name for name in trained if name.endswith((".bin", ".pt", ".pth", ".pkl"))] in ([], ["training_args.bin"])
    logits = torch.load(output / "trained.pt", weights_only=True)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output).eval()(IDS).logits, logits)
    assert not torch.equal(logits, expected)


def test_trust_loads_without_an_import_and_refusal_stops(hub, run, checkpoint, tmp_path):
    folder, expected = checkpoint
    repository = hub.repository("tester/model")
    repository.mkdir(parents=True)
    for name, content in contents(folder).items():
        (repository / name).write_bytes(content)
    results = results_of(run(LOAD, "tester/model", tmp_path))
    assert 'ValueError: Specified `attn_implementation="asentmax"` is not supported' in results["no trust"]
    assert results["refused"] == results["no trust"]
    assert (results["one field"]["alpha"], results["one field"]["position_encoding"]) == (1.25, "nape")
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert results["text"].startswith("a b c")
    assert results["head"] == ["LlamaForSequenceClassification", "asentmax"]
    again = contents(tmp_path / "again")
    assert again[REMOTE_CODE_FILE] == (folder / REMOTE_CODE_FILE).read_bytes()
    assert json.loads(again["config.json"])["architectures"] == ["LlamaForCausalLM"]
    assert json.loads(again["config.json"])["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()(IDS).logits, expected)


def test_without_the_package_trust_names_what_to_install(hub, run, checkpoint, tmp_path):
    results = results_of(run(WITHOUT_PACKAGE + LOAD, checkpoint[0], tmp_path))
    assert "ImportError" in results["trust"]
    assert "pip install hf_sparse_attention" in results["trust"]
    assert 'attn_implementation="asentmax"` is not supported' in results["no trust"]


def test_failing_pushes_say_so_and_keep_the_local_files(hub, run, checkpoint, tmp_path):
    folder, expected = checkpoint
    hub.faults = {"/api/models/tester/model/commit/": "500", "/lfs-store/tester/trainer/": "hang up"}
    process = run(FAILING_PUSH, folder, tmp_path)
    assert process.returncode != 0
    assert "500 Internal Server Error" in process.stdout
    assert f"{hub.url}/api/models/tester/model/commit/main" in process.stdout
    assert "pushed" not in process.stdout
    assert "Error while uploading 'model.safetensors' to the Hub" in process.stderr
    assert all(any(fault in path for _, path in hub.requests) for fault in hub.faults)
    for name in ("model", "trainer"):
        assert not any(file.endswith(".safetensors") for file in hub.files(f"tester/{name}"))
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(IDS).logits, expected)


def test_recipe_pushes_what_it_wrote_or_says_where_it_is(hub, run, checkpoint, tmp_path):
    output, text = tmp_path / "output", tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l " * 9)
    hub.faults = {"/tester/broken-run.git/info/lfs": "500", "/api/models/tester/silent-run/commit/": "hang up"}
    arguments = ["--model_name_or_path", checkpoint[0], "--train_data", text, "--output_dir", output]
    process = run(RECIPE, RECIPES, *arguments, tmp_path / "tuned")
    assert process.returncode == 0, process.stderr
    tuned = hub.files("tester/tuned")
    assert {"model.safetensors", "README.md", *(f"adapter/adapter_{x}" for x in ADAPTER)} <= set(tuned)
    assert all((tmp_path / "tuned" / name).read_bytes() == content for name, content in tuned.items())
    pushed, local = hub.files("tester/good-run"), contents(output)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", REMOTE_CODE_FILE} <= set(pushed)
    # The card was written anew for the last push, with its repository's name.
    card = pushed.pop("README.md").decode()
    assert local["README.md"].decode() == card.replace("good-run", "silent-run")
    assert {name: local[name] for name in pushed} == pushed
    errors = [line for line in process.stderr.splitlines() if line.startswith("pretrain.py: error: ")]
    for name, reason in {"broken-run": "Server error '500", "silent-run": "Server disconnected"}.items():
        assert any(
            line.startswith(f"pretrain.py: error: tester/{name}: could not be pushed ({reason}") for line in errors
        )
        assert "model.safetensors" not in hub.files(f"tester/{name}")
    assert process.stderr.count(f"the model is in {output}") == 2
    assert AutoModelForCausalLM.from_pretrained(output).config._attn_implementation == "asentmax"


@pytest.mark.parametrize("family", FAMILIES)
def test_remote_code_of_every_family(tmp_path, monkeypatch, family):
    """The file's classes have transformers' names, so that ``architectures`` stays what it was."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {"AutoModel", "AutoModelForCausalLM"} <= set(auto_map)
    assert auto_map["AutoModelForCausalLM"] == f"modeling_sparse_attention.{type(model).__name__}"
    code = imported(tmp_path / REMOTE_CODE_FILE, monkeypatch)
    for reference in auto_map.values():
        cls = getattr(code, reference.removeprefix("modeling_sparse_attention."))
        assert issubclass(cls, TrustedCheckpoint)
        assert getattr(transformers, cls.__name__) in cls.__mro__
    assert (tmp_path / REMOTE_CODE_FILE).read_text().count("\nclass ") == len(set(auto_map.values()))


@pytest.mark.parametrize("kind", [llava, gemma3])
def test_remote_code_of_composite_models(tmp_path, monkeypatch, kind):
    """The settings are the text model's; one changed field leaves the others, also where the config lost them."""
    model_class, config, _ = kind(attn_implementation="asentmax", sparse_attention={"position_encoding": "nape"})
    model_class(config).save_pretrained(tmp_path)
    code = imported(tmp_path / REMOTE_CODE_FILE, monkeypatch)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == f"modeling_sparse_attention.{model_class.__name__}"
    loaded = getattr(code, model_class.__name__).from_pretrained(
        tmp_path, config=AutoConfig.from_pretrained(tmp_path), sparse_attention={"alpha": 1.25}
    )
    settings = loaded.config.text_config.sparse_attention
    assert (settings["alpha"], settings["position_encoding"]) == (1.25, "nape")
    assert loaded.config.sparse_attention is None


def test_with_the_package_imported_nobody_is_asked(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(builtins, "input", lambda text="": pytest.fail(f"asked: {text}"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path)


def test_models_without_a_preset_carry_no_code(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "sparse")
    revert(model)
    model.save_pretrained(tmp_path / "reverted")
    sdpa = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", attn_implementation="sdpa")
    sdpa.save_pretrained(tmp_path / "sdpa")
    for name in ("reverted", "sdpa"):
        assert not (tmp_path / name / REMOTE_CODE_FILE).exists()
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())
    convert(sdpa, "ssmax")
    randomize_scale(sdpa)
    sdpa.save_pretrained(tmp_path / "ssmax")
    assert (tmp_path / "ssmax" / REMOTE_CODE_FILE).exists()


def test_code_of_others_is_left_alone(tmp_path):
    model = tiny_model()
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_mine.Mine"
    assert auto_map["AutoModel"] == "modeling_sparse_attention.LlamaModel"
    assert "LlamaForCausalLM" not in (tmp_path / REMOTE_CODE_FILE).read_text()


@pytest.mark.parametrize("preset", ["asentmax", "ssmax"])
def test_a_config_saved_by_itself_asks_for_its_preset(tmp_path, preset):
    tiny_config(attn_implementation=preset, sparse_attention={"position_encoding": "nope"}).save_pretrained(tmp_path)
    assert (tmp_path / REMOTE_CODE_FILE).exists()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert model.config._attn_implementation == preset
    assert model.config.sparse_attention["position_encoding"] == "nope"
