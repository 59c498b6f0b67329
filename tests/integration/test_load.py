"""Many models one after the other, side by side and in two threads: nothing is left behind, nothing is shared."""

import copy
import gc
import weakref

import psutil
import pytest
import torch
from families import alone, tiny_config, tiny_model
from torch.nn.modules import module as torch_module
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_sparse_attention import convert, revert

ROW = torch.arange(2, 13)
KINDS = [
    ("llama", "asentmax", "nape"),
    ("gpt_neox", "ssmax", "model"),
    ("qwen3", "softmax", "alibi"),
    ("llama", "topk", "nope"),
]


@pytest.fixture
def checkpoints(tmp_path):
    """A folder and its model's logits for every kind."""
    saved = []
    for number, kind in enumerate(KINDS):
        model = tiny_model(*kind)
        model.save_pretrained(tmp_path / str(number))
        saved.append((tmp_path / str(number), alone(model, ROW)))
    return saved


def make(number, checkpoints):
    """Build, load or convert, by turns."""
    kind = KINDS[number % len(KINDS)]
    if number % 3 == 0:
        return tiny_model(*kind)
    if number % 3 == 1:
        return AutoModelForCausalLM.from_pretrained(checkpoints[number % len(KINDS)][0])
    model = AutoModelForCausalLM.from_config(tiny_config())
    convert(model, "asentmax", position_encoding="nape")
    if number % 2:
        revert(model)
    return model


def attached_everywhere():
    """What hooks and wrapped methods there are outside of models."""
    return (
        dict(torch_module._global_forward_pre_hooks),
        dict(torch_module._global_forward_hooks),
        {name: getattr(PreTrainedModel, name) for name in ("post_init", "_initialize_weights", "from_pretrained")},
        {name: getattr(PreTrainedConfig, name) for name in ("to_json_file", "sparse_attention", "from_dict")},
        dict(vars(LlamaAttention)),
    )


def test_two_hundred_models_leave_nothing_behind(checkpoints):
    models = weakref.WeakSet()
    before, objects, memory = attached_everywhere(), [], []
    for number in range(200):
        model = make(number, checkpoints)
        alone(model, ROW)
        models.add(model)
        del model
        if number % 50 == 49:
            gc.collect()
            objects.append(len(gc.get_objects()))
            memory.append(psutil.Process().memory_info().rss)
    assert len(models) == 0
    assert attached_everywhere() == before
    # The first fifty fill caches; one object per model would make a hundred.
    assert objects[-1] - objects[1] < 50, objects
    # Weights of a tiny model take 130 kB: a hundred kept ones would be 13 MB.
    assert memory[-1] - memory[1] < 8 * 2**20, memory


def test_models_of_all_kinds_at_once_keep_their_own_settings(checkpoints):
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder, _ in checkpoints]
    settings = [copy.deepcopy(model.config.sparse_attention) for model in models]
    models[0].config.sparse_attention["alpha"] = 2.0
    changed = alone(models[0], ROW)
    for _ in range(3):
        for model, (_, expected) in list(zip(models, checkpoints))[1:]:
            assert torch.equal(alone(model, ROW), expected)
        assert torch.equal(alone(models[0], ROW), changed)
    assert not torch.equal(changed, checkpoints[0][1])
    models[0].config.sparse_attention["alpha"] = settings[0]["alpha"]
    assert torch.equal(alone(models[0], ROW), checkpoints[0][1])
    assert [model.config.sparse_attention for model in models] == settings


THREADS = """
import sys, threading, torch
from families import alone, tiny_model
from test_load import KINDS, ROW
from transformers import AutoModelForCausalLM

expected, failures, barrier = torch.load(f"{sys.argv[1]}/expected.pt"), [], threading.Barrier(2)

def work(number):
    family, preset, position = KINDS[number]
    try:
        barrier.wait(timeout=60)
        for _ in range(15):
            model = tiny_model(family, preset, position)
            settings = model.config.sparse_attention
            assert (settings["preset"], settings["position_encoding"]) == (preset, position)
            assert alone(model, ROW).isfinite().all()
            loaded = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{number}")
            assert torch.equal(alone(loaded, ROW), expected[number])
    except Exception as error:
        failures.append((number, repr(error)))

sys.setswitchinterval(1e-5)
threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(str(failures) if failures else 0)
"""


def test_threads_build_and_load_different_models_at_once(forked, checkpoints, tmp_path):
    """In a process of its own: transformers patches torch.nn.init while it builds, and races leave it patched."""
    torch.save([logits for _, logits in checkpoints], tmp_path / "expected.pt")
    result = forked(THREADS, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
