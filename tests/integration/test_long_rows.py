"""Long rows need no mask of length x length, however packed documents and sliding windows are given."""

import pytest
import torch
from families import alone, assert_same, packed, prompts, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_sparse_attention import attention

LENGTHS = (13, 8)
BOUNDS = torch.tensor([0, 13, 21], dtype=torch.int32)
# Mistral has a sliding window of 5 tokens in every layer, Gemma3 in one of two.
FAMILIES = ("llama", "gpt_neox", "mistral", "gemma3", "phi3")


def ways(positions):
    """How a row of documents may come, and whether they stay apart."""
    lengths = {"max_length_q": 13, "max_length_k": 13}
    return {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(2), torch.tensor(LENGTHS))[None]},
        "cu_seq_lens": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, **lengths},
        "all of them": {
            "position_ids": positions,
            "seq_idx": torch.repeat_interleave(torch.arange(2), torch.tensor(LENGTHS))[None],
            "cu_seq_lens_q": BOUNDS,
            "cu_seq_lens_k": BOUNDS,
        },
    }


@pytest.fixture
def masks(monkeypatch):
    """The masks that attention layers are handed."""
    seen, original = [], attention.visibility
    monkeypatch.setattr(
        attention, "visibility", lambda mask, *args, **kwargs: seen.append(mask) or original(mask, *args, **kwargs)
    )
    return seen


@pytest.mark.parametrize("position", ["model", "nape"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_built(family, position, masks):
    model, documents = tiny_model(family, position=position), prompts(*LENGTHS)
    row, positions = packed(documents)
    expected = torch.cat([alone(model, document) for document in documents])
    with torch.no_grad():
        for name, way in ways(positions).items():
            assert_same(model(row, use_cache=False, **way).logits[0], expected, name)
        # A prompt of one document is read into a cache, with the padding mask that generate makes.
        model(row, attention_mask=torch.ones_like(row), use_cache=True)
    assert masks == [None] * len(masks)
    assert len(masks) == 7 * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_no_mask_is_compiled(family):
    """Neither for documents nor for a plain row, whose position ids transformers makes itself."""
    model, documents = tiny_model(family, position="nape"), prompts(*LENGTHS)
    row, positions = packed(documents)
    shapes = []

    def record(graph, inputs):
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            shapes.extend([tuple(value.shape)] if isinstance(value, torch.Tensor) else [])
        return graph

    for way in ({"position_ids": positions}, {}):
        compiled = torch.compile(model, fullgraph=True, backend=record)
        with torch.no_grad():
            logits = compiled(row, use_cache=False, **way).logits
            assert_same(logits, model(row, use_cache=False, **way).logits, str(list(way)))
        torch._dynamo.reset()
    assert (1, 21, 48) in shapes
    assert not [shape for shape in shapes if shape.count(21) > 1]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_memory_of_packed_rows_grows_with_the_length(family):
    model, largest = tiny_model(family, position="nape"), {}
    for documents in (8, 16):
        row, positions = packed(prompts(*[250] * documents))
        with torch.no_grad(), Largest() as made:
            model(row, position_ids=positions, use_cache=False, logits_to_keep=1)
        largest[documents] = made.elements
    assert largest[16] <= 2 * largest[8]


def test_stock_attention_goes_on_making_its_mask():
    model = AutoModelForCausalLM.from_config(tiny_config("mistral")).eval()
    documents = prompts(*LENGTHS)
    row, positions = packed(documents)
    expected = torch.cat([alone(model, document) for document in documents])
    with torch.no_grad():
        assert_same(model(row, position_ids=positions, use_cache=False).logits[0], expected, "packed")
        assert not torch.allclose(model(row, use_cache=False).logits[0], expected, atol=1e-2)
