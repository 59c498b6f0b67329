"""What divides a sequence between processes is refused, never computed on one process's part of it."""

import pytest
import torch
from accelerate.utils import DeepSpeedSequenceParallelConfig
from families import prompts, tiny_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from hf_sparse_attention.config import PRESETS


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_context_parallelism(mesh, compiled):
    model, ids = tiny_model(), torch.stack(prompts(8))
    expected = model(ids, use_cache=False).logits
    refusal = pytest.raises(ValueError, match=r"'asentmax' cannot be computed under context parallelism.*FSDP2")
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]), refusal:
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(ids, use_cache=False)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_ulysses_in_accelerate(preset):
    with pytest.raises(ValueError, match=f"sp_attn_implementation.*{preset}"):
        DeepSpeedSequenceParallelConfig(sp_attn_implementation=preset)
