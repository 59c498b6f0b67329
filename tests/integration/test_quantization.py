"""Weights in int8, which leave the length scale in full precision, and quantised caches."""

from types import SimpleNamespace

import pytest
import torch
from families import CACHE, alone, prompts, tiny_model
from optimum.quanto.library.extensions import cpp
from test_generation import greedy
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.cache_utils import Cache, QuantizedLayer, QuantoQuantizedLayer
from transformers.pytorch_utils import Conv1D

from hf_sparse_attention.length_scale import SCALE_MODULES

INT8 = {"torchao": TorchAoConfig(Int8WeightOnlyConfig()), "bitsandbytes": BitsAndBytesConfig(load_in_8bit=True)}


@pytest.fixture(params=["model", "nape"])
def model(request):
    return tiny_model(position=request.param)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("config", INT8.values(), ids=INT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_int8_leaves_the_length_scale_alone(tmp_path, family, config, dtype):
    model = tiny_model(family, position="nape")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=dtype).eval()
    parameters = dict(loaded.named_parameters())
    quantized = {name for name, parameter in parameters.items() if type(parameter) is not nn.Parameter}
    linear = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    assert quantized == linear - {"lm_head.weight", "embed_out.weight"}
    scale = {name: parameter for name, parameter in model.named_parameters() if ".length_scale." in name}
    assert len(scale) == 8
    assert not quantized & scale.keys()
    for name, parameter in scale.items():
        assert torch.equal(parameters[name], parameter.to(dtype))
    (row,) = prompts(13)
    expected = alone(model, row)
    assert 0 < (alone(loaded, row) - expected).norm() < 0.1 * expected.norm()
    assert loaded.generate(row[None], max_new_tokens=3, do_sample=False).shape == (1, 16)


def test_the_length_scale_is_nothing_that_libraries_replace():
    scale = [module for module in tiny_model(position="nape").modules() if isinstance(module, SCALE_MODULES)]
    assert len(scale) == 4
    assert not any(isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) for module in scale)


class RoundedLayer(QuantizedLayer):
    """The quantised cache of transformers on a quantiser as fine as is wanted."""

    def __init__(self, step):
        super().__init__(residual_length=3)
        self.step = step

    def _quantize(self, tensor, axis):
        return (tensor / self.step).round().to(torch.int32)

    def _dequantize(self, q_tensor):
        return q_tensor * self.step


def test_finely_quantized_cache_changes_nothing(model):
    (row,) = prompts(7)
    expected = greedy(model, row, 9)
    cache = Cache(layers=[RoundedLayer(1e-4) for _ in model.model.layers])
    assert model.generate(row[None], max_new_tokens=9, do_sample=False, **{CACHE: cache})[0].tolist() == expected
    assert cache.get_seq_length() == 15
    assert cache.layers[0]._quantized_keys.shape[-2] > 7


QUANTO = {"q_group_size": 8, "residual_length": 3}


@pytest.fixture(autouse=True)
def _quanto_in_torch(monkeypatch):
    """What quanto unpacks on a CPU with C++, and so with a compiler, in torch."""

    def unpack(packed, bits):
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))


def quanto_cache(model, bits):
    return Cache(layers=[QuantoQuantizedLayer(nbits=bits, **QUANTO) for _ in model.model.layers])


@pytest.mark.parametrize("bits", [4, 2])
def test_quanto_cache_gives_what_stock_attention_gives(tmp_path, bits):
    model = tiny_model(preset="softmax")
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    ids = torch.stack(prompts(12, 12))
    logits = []
    for each in (model, stock):
        cache = quanto_cache(each, bits)
        with torch.no_grad():
            chunks = [each(chunk, **{CACHE: cache}).logits for chunk in ids.split([4, 1, 1, 3, 1, 1, 1], dim=1)]
        logits.append(torch.cat(chunks, dim=1))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0], model(ids).logits, atol=1e-2)


def test_generation_with_a_quanto_cache(model):
    (row,) = prompts(9)
    cache, tokens = quanto_cache(model, 4), [row]
    with torch.no_grad():
        for _ in range(8):
            tokens.append(model(tokens[-1][None], **{CACHE: cache}).logits[0, -1:].argmax(-1))
    generated = model.generate(
        row[None],
        max_new_tokens=8,
        do_sample=False,
        cache_implementation="quantized",
        cache_config={"backend": "quanto", "nbits": 4, **QUANTO},
    )
    assert generated[0].tolist() == torch.cat(tokens).tolist()
