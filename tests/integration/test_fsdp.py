"""FSDP2 with activation checkpointing, and DDP, over gloo processes give the losses and gradients of one process."""

from pathlib import Path

import pytest
import torch
from families import prompts, tiny_model
from transformers import AutoModelForCausalLM

from hf_sparse_attention import parameter_groups

ROWS, LENGTH, RATE = 4, 11, 0.1

SPREAD = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from hf_sparse_attention import parameter_groups

folder, rate = sys.argv[1], float(sys.argv[2])

def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()

def spread(model, kind, world):
    if kind == "ddp":
        return DistributedDataParallel(model)
    half = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if kind == "fsdp_bf16" else {}
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **half)
    fully_shard(model, mesh=mesh, **half)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model

def work(rank, kind, world):
    name = f"{folder}/{kind}_{world}"
    dist.init_process_group("gloo", init_method=f"file://{name}.store", rank=rank, world_size=world)
    plain = AutoModelForCausalLM.from_pretrained(folder).train()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    model = spread(plain, kind, world)
    optimizer = torch.optim.SGD(parameter_groups(plain, 0.5, rate))
    ids = torch.load(f"{folder}/ids.pt")
    share = ids.chunk(world)[rank]
    loss = model(share, labels=share, use_cache=False).loss
    loss.backward()
    dist.all_reduce(mean := loss.detach().clone())
    results = {
        "loss": mean / world,
        "grads": {name: whole(parameter.grad) for name, parameter in plain.named_parameters()},
        "local": sum(getattr(p, "_local_tensor", p).numel() for p in plain.parameters()),
    }
    optimizer.step()
    model.eval()
    with torch.no_grad():
        results["logits"] = model(ids, use_cache=False).logits
    state = get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        plain.save_pretrained(name, state_dict=state)
        torch.save(results, f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()

for case in sys.argv[3:]:
    kind, world = case.rsplit("_", 1)
    mp.start_processes(work, (kind, int(world)), nprocs=int(world), start_method="fork")
"""

# Largest error of gradients, relative to the largest gradient, and of the loss; the last digit counts processes.
CASES = {"fsdp_2": 1e-5, "fsdp_4": 1e-5, "fsdp_bf16_2": 0.1, "ddp_4": 1e-5}


@pytest.fixture(scope="module")
def spread(forked, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Folder with the results of all cases, and those of one process."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("spread")
    model, ids = tiny_model(position="nape"), torch.stack(prompts(*[LENGTH] * ROWS))
    model.save_pretrained(folder)
    torch.save(ids, folder / "ids.pt")
    result = forked(SPREAD, folder, RATE, *CASES)
    assert result.returncode == 0, result.stderr[-9000:]

    optimizer = torch.optim.SGD(parameter_groups(model.train(), 0.5, RATE))
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    logits = model.eval()(ids, use_cache=False).logits.detach()
    return folder, {
        "ids": ids,
        "loss": loss.detach(),
        "grads": grads,
        "logits": logits,
        "size": model.num_parameters(),
    }


@pytest.mark.parametrize(("case", "tolerance"), CASES.items(), ids=CASES)
def test_step_equals_one_process(spread, case, tolerance):
    folder, one = spread
    many = torch.load(folder / f"{case}.pt")
    assert many["grads"].keys() == one["grads"].keys()
    assert any("length_scale" in name for name in many["grads"])
    largest = max(grad.abs().max() for grad in one["grads"].values())
    for name, grad in one["grads"].items():
        assert (many["grads"][name] - grad).abs().max() <= tolerance * largest, name
    torch.testing.assert_close(many["loss"], one["loss"], atol=tolerance, rtol=tolerance)
    processes = int(case[-1])
    # No process holds more than its share; small parameters do not divide evenly.
    assert many["local"] == one["size"] if "ddp" in case else many["local"] <= 1.1 * one["size"] / processes


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" not in case])
def test_saved_state_in_one_process(spread, case):
    folder, one = spread
    loaded = AutoModelForCausalLM.from_pretrained(folder / case).eval()
    with torch.no_grad():
        logits = loaded(one["ids"], use_cache=False).logits
    torch.testing.assert_close(logits, torch.load(folder / f"{case}.pt")["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, one["logits"], atol=1e-3, rtol=1e-3)
    assert loaded.config.sparse_attention["position_encoding"] == "nape"
