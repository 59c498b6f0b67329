"""Tensor parallelism over two and four processes (gloo) gives the logits and gradients of one process."""

import pytest
import torch
from families import prompts, tiny_model

SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
import hf_sparse_attention
from transformers import AutoModelForCausalLM

def load(path):
    try:
        from transformers.distributed import DistributedConfig
        return AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_plan="auto"))
    except (ImportError, TypeError):
        return AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")

def work(rank, folder, cases, world):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    results = {}
    for name in cases:
        model = load(f"{folder}/{name}")
        ids = torch.load(f"{folder}/{name}/ids.pt")
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        scale = model.model.layers[1].self_attn.length_scale
        local = scale.beta_proj.weight if hasattr(scale, "beta_proj") else scale.factor.weight
        local = local.to_local() if hasattr(local, "to_local") else local
        norm = model.model.norm.weight.grad
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        results[name] = {"logits": out.logits.detach(), "heads": local.shape[0], "norm": norm}
    if rank == 0:
        torch.save(results, f"{folder}/{world}.pt")
    dist.barrier()
    # Threads of the process group can abort a process whose interpreter shuts down.
    os._exit(0)

for group in sys.argv[2:]:
    world, *cases = group.split(",")
    mp.start_processes(work, (sys.argv[1], cases, int(world)), nprocs=int(world), start_method="fork")
"""


CASES = {
    2: {"asentmax": {}, "nape": {"position": "nape"}, "ssmax": {"preset": "ssmax"}},
    # As many as there are key heads.
    4: {"eight heads": {"position": "nape", "num_attention_heads": 8, "num_key_value_heads": 4}},
}


@pytest.fixture(scope="module")
def sharded(forked, tmp_path_factory):
    """Results of one process, and of several, by the number of processes and the name of the case."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sharded")
    expected = {}
    for processes, cases in CASES.items():
        for name, case in cases.items():
            model, ids = tiny_model(**case), torch.stack(prompts(9, 9))
            model.save_pretrained(folder / name)
            torch.save(ids, folder / name / "ids.pt")
            out = model(ids, labels=ids, use_cache=False)
            out.loss.backward()
            heads = model.config.num_attention_heads
            expected[processes, name] = {
                "logits": out.logits.detach(),
                "heads": heads / processes,
                "norm": model.model.norm.weight.grad,
            }
    groups = [",".join([str(processes), *cases]) for processes, cases in CASES.items()]
    result = forked(SHARDED, folder, *groups)
    assert result.returncode == 0, result.stderr[-9000:]
    found = {
        (processes, name): results
        for processes in CASES
        for name, results in torch.load(folder / f"{processes}.pt").items()
    }
    return expected, found


@pytest.mark.parametrize(
    ("processes", "name"), [(processes, name) for processes, cases in CASES.items() for name in cases]
)
def test_processes_equal_one(sharded, processes, name):
    one, many = (results[processes, name] for results in sharded)
    assert many["heads"] == one["heads"]
    torch.testing.assert_close(many["logits"], one["logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(many["norm"], one["norm"], atol=1e-4, rtol=1e-4)
