"""Tensor parallelism over two and four processes (gloo) gives the logits and gradients of one process."""

import subprocess
import sys

import pytest
import torch
from families import prompts, tiny_model

SHARDED = """
import os, sys, torch
import hf_sparse_attention
from transformers import AutoModelForCausalLM
try:
    from transformers.distributed import DistributedConfig
    plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
    AutoModelForCausalLM.from_pretrained(sys.argv[1], **plan)
except (ImportError, TypeError):
    plan = {"tp_plan": "auto"}
results = {}
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, **plan)
    ids = torch.load(f"{path}/ids.pt")
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    scale = model.model.layers[1].self_attn.length_scale
    local = scale.beta_proj.weight if hasattr(scale, "beta_proj") else scale.factor.weight
    local = local.to_local() if hasattr(local, "to_local") else local
    results[path] = {"logits": out.logits.detach(), "heads": local.shape[0],
                     "norm": model.model.norm.weight.grad}
if torch.distributed.get_rank() == 0:
    torch.save(results, f"{sys.argv[1]}/results.pt")
torch.distributed.barrier()
# Threads of the process group can abort a process whose interpreter shuts down.
os._exit(0)
"""


CASES = {
    2: {"asentmax": {}, "nape": {"position": "nape"}, "ssmax": {"preset": "ssmax"}},
    # As many as there are key heads.
    4: {"nape": {"position": "nape", "num_attention_heads": 8, "num_key_value_heads": 4}},
}


@pytest.mark.parametrize("processes", CASES)
def test_processes_equal_one(tmp_path, processes):
    expected = {}
    for name, case in CASES[processes].items():
        folder = tmp_path / name
        model, ids = tiny_model(**case), torch.stack(prompts(9, 9))
        model.save_pretrained(folder)
        torch.save(ids, folder / "ids.pt")
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        expected[str(folder)] = out.logits.detach(), model.model.norm.weight.grad, model.config.num_attention_heads
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    result = subprocess.run([*command, str(script), *expected], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-9000:]
    for folder, results in torch.load(f"{next(iter(expected))}/results.pt").items():
        logits, norm, heads = expected[folder]
        assert results["heads"] == heads / processes
        torch.testing.assert_close(results["logits"], logits, atol=1e-4, rtol=1e-4)
        gradient = results["norm"].full_tensor() if hasattr(results["norm"], "full_tensor") else results["norm"]
        torch.testing.assert_close(gradient, norm, atol=1e-4, rtol=1e-4)
