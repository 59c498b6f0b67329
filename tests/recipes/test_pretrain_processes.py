"""Training in other processes: killed ones continue, several give the losses of one."""

import ast
import os
import shutil
import signal

import pytest
from forked import forking
from launched import COMMANDS, SEVERAL, launch
from tiny_run import RECIPES, as_flags, read_metrics
from transformers import AutoModelForCausalLM

from hf_sparse_attention.checkpoints import list_checkpoints

START = f"import os, signal, sys; sys.path.insert(0, {str(RECIPES)!r}); import pretrain\n"

KILLED_IN_A_STEP = """
original, calls = pretrain.forward_backward, []
def forward_backward(*args):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
pretrain.forward_backward = forward_backward
"""

KILLED_WHILE_SAVING = """
import accelerate.accelerator
original, calls = accelerate.accelerator.save_accelerator_state, []
def save_accelerator_state(output_dir, *args, **kwargs):
    calls.append(1)
    location = original(output_dir, *args, **kwargs)
    if len(calls) == 3:
        (location / "optimizer.bin").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return location
accelerate.accelerator.save_accelerator_state = save_accelerator_state
"""

# Starts the run again and again in children, which cost no imports. Twenty of them are killed at a random one of their
# file operations and forward passes, every other one after its training began.
KILLED_OFTEN = """
import random
output, kills = sys.argv[sys.argv.index("--output_dir") + 1], []
rng, finished = random.Random(0), 0
while True:
    in_setup = len(kills) % 2 == 0
    countdown = [rng.randrange(1, 200 if in_setup else 120) if len(kills) < 20 else 0]
    training = []
    child = os.fork()
    if child == 0:
        def tick(event, args=()):
            if event.startswith(("open", "os.", "shutil.", "forward")) and (in_setup or training):
                countdown[0] -= 1
                if countdown[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        original = pretrain.forward_backward
        def forward_backward(*args):
            training.append(1)
            tick("forward")
            result = original(*args)
            tick("forward")
            return result
        pretrain.forward_backward = forward_backward
        sys.addaudithook(tick)
        status = 1
        try:
            pretrain.main(sys.argv[1:])
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        finished += len(kills) < 20
        if len(kills) == 20:
            break
        continue
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    kills.append(sorted(name for name in os.listdir(output) if "checkpoint-" in name) if os.path.isdir(output) else [])
print(finished, kills)
"""

# Two processes that begin at the same time; each prints to a file of its own.
RIVALS = """
children = []
for number in (0, 1):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(f"{sys.argv[1]}/{number}.txt", "w") as sys.stderr:
                pretrain.main(sys.argv[2:])
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        finally:
            os._exit(status)
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""

# accelerate offers FSDP on accelerators only; these lines make it take two CPU processes for two GPUs. A signal that
# one of the processes gets after five steps stops both, then both continue.
FSDP_ON_CPU = """
import torch
from accelerate.utils import DistributedType

torch.accelerator.is_available = lambda: True
original, calls = pretrain.forward_backward, []
def forward_backward(accelerator, model, *args):
    assert accelerator.is_fsdp2 and type(model).__name__.startswith("FSDP")
    calls.append(1)
    if len(calls) == 5 and accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(accelerator, model, *args)
pretrain.forward_backward = forward_backward

def run(flags):
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    try:
        pretrain.main(flags)
    finally:
        forget_accelerate()

for flags in runs:
    calls.clear()
    try:
        run(flags)
    except SystemExit as leaving:
        assert leaving.code == 128 + signal.SIGTERM, leaving.code
    else:
        raise AssertionError("the signal was ignored")
    run([*flags, "--resume", "latest"])
"""


def environment(tmp_path):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}


@pytest.fixture(scope="module")
def forking_process(tmp_path_factory):
    with forking(START, tmp_path_factory.mktemp("forked"), {**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        yield run


@pytest.fixture
def forked(forking_process, tmp_path):
    """Runs a program that finds pretrain.py imported and no data cached."""
    own_cache = f"import datasets; datasets.config.HF_DATASETS_CACHE = {str(tmp_path / 'datasets')!r}\n"
    return lambda program, *arguments: forking_process(own_cache + program, *arguments)


def assert_same_run(left, right):
    left, right = read_metrics(left), read_metrics(right)
    assert [line["step"] for line in left] == [line["step"] for line in right]
    for name in ("loss", "grad_norm", "tokens"):
        wanted = [line[name] for line in right if name in line]
        assert [line[name] for line in left if name in line] == pytest.approx(wanted, rel=1e-4)
    assert left[-1]["eval_loss"] == pytest.approx(right[-1]["eval_loss"], rel=1e-4)


WEIGHTED_ROWS = {
    "length": 64,
    "retrieval_fraction": 0.4,
    "retrieval_weight": 2.5,
    "retrieval_tasks": ["s_niah_1"],
    "retrieval_format": {"wording": "short", "number_digits": 2},
}


ROWS = {"text": {}, "weighted retrieval": WEIGHTED_ROWS}


@pytest.fixture(scope="module")
def validated(tiny_options, text_file):
    """Options by the kind of rows."""
    # 7 validation rows: one process of two gets a row less
    more = {"validation_data": str(text_file), "validation_rows": 7}
    return {name: {**tiny_options, **changes, **more} for name, changes in ROWS.items()}


@pytest.fixture(scope="module")
def single(pretrain, validated, tmp_path_factory):
    """Undisturbed runs of one process."""
    folder = tmp_path_factory.mktemp("single")
    return {name: pretrain(folder / name, **options, keep_checkpoints=9) for name, options in validated.items()}


def launch_all(config, program, validated, folder, script=(), **changes):
    runs = {name: {**options, "output_dir": folder / name, **changes} for name, options in validated.items()}
    launch(config, program, [[*script, *as_flags(options)] for options in runs.values()], folder, environment(folder))
    return {name: options["output_dir"] for name, options in runs.items()}


@pytest.fixture(scope="module")
def double(validated, tmp_path_factory):
    script = [str(RECIPES / "pretrain.py")]
    return launch_all(
        "multi_gpu.yaml", COMMANDS, validated, tmp_path_factory.mktemp("double"), script, device_batch_size=1
    )


@pytest.fixture(scope="module")
def divided(validated, tmp_path_factory):
    return launch_all("fsdp2.yaml", START + SEVERAL + FSDP_ON_CPU, validated, tmp_path_factory.mktemp("divided"))


@pytest.mark.parametrize(
    ("death", "last"), [(KILLED_IN_A_STEP, 6), (KILLED_WHILE_SAVING, 6)], ids=["in-a-step", "while-saving"]
)
def test_killed_and_resumed(pretrain, forked, trained, tiny_options, tmp_path, death, last):
    output = tmp_path / "run"
    process = forked(death + "pretrain.main(sys.argv[1:])", *as_flags({**tiny_options, "output_dir": output}))
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert list_checkpoints(output)[-1].name == f"checkpoint-{last:08d}"
    assert (death is KILLED_WHILE_SAVING) == bool(list(output.glob(".checkpoint-*.tmp")))
    pretrain(output, resume="latest")
    assert read_metrics(output) == read_metrics(trained)
    assert not list(output.glob(".checkpoint-*"))


def test_killed_at_random_moments(pretrain, forked, tiny_options, tmp_path):
    output = tmp_path / "run"
    options = {**tiny_options, "max_steps": 60, "save_steps": 2, "resume": "latest"}
    process = forked(KILLED_OFTEN, *as_flags({**options, "output_dir": output}))
    assert process.returncode == 0, process.stderr[-3000:]
    finished, kills = process.stdout.splitlines()[-1].split(" ", 1)
    kills = ast.literal_eval(kills)
    assert len(kills) == 20
    assert int(finished) == 0, "it was over before the last kill"
    assert len({str(names) for names in kills}) >= 5, "all were killed at the same place"
    assert any(name.startswith(".") for names in kills for name in names), "none was killed while saving"
    assert read_metrics(output) == read_metrics(pretrain(tmp_path / "whole", **options))
    assert not list(output.glob(".checkpoint-*"))


def test_two_runs_in_one_folder(pretrain, forked, tiny_options, tmp_path):
    output = tmp_path / "run"
    options = {**tiny_options, "max_steps": 30}
    process = forked(RIVALS, tmp_path, *as_flags({**options, "output_dir": output}))
    codes = [int(code) for code in process.stdout.splitlines()[-1].split()]
    assert sorted(codes) == [0, 1], process.stderr[-3000:]
    refused = (tmp_path / f"{codes.index(1)}.txt").read_text().splitlines()[-1]
    # The second if the other was over already.
    reasons = (": another process is writing to this folder", " holds a run already (")
    assert refused.startswith(tuple(f"pretrain.py: error: {output}{reason}" for reason in reasons))
    assert read_metrics(output) == read_metrics(pretrain(tmp_path / "alone", **options))


@pytest.mark.parametrize("rows", ROWS)
def test_two_processes(pretrain, single, double, validated, rows):
    assert_same_run(double[rows], single[rows])
    shutil.rmtree(double[rows] / "checkpoint-00000010")
    pretrain(double[rows], **validated[rows], resume="latest")  # one process goes on for two
    assert_same_run(double[rows], single[rows])


@pytest.mark.parametrize("rows", ROWS)
def test_two_processes_with_divided_parameters(single, divided, rows):
    assert_same_run(divided[rows], single[rows])
    names = [path.name for path in list_checkpoints(divided[rows])]
    assert names == ["checkpoint-00000009", "checkpoint-00000010"]
    # Saved whole, for one process.
    model = AutoModelForCausalLM.from_pretrained(divided[rows])
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(single[rows]).num_parameters()


def test_fsdp_without_an_accelerator_is_refused(pretrain, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(SystemExit):
        pretrain(tmp_path / "run")
    assert "FSDP is configured, but accelerate runs NO on cpu" in capsys.readouterr().err
