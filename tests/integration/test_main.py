"""``python -m hf_sparse_attention``: what it prints, and that a wrong kernel fails it."""

import importlib.metadata
import re
import runpy
import sys
import warnings

import pytest
import torch

import hf_sparse_attention
from hf_sparse_attention import __main__ as command
from hf_sparse_attention.ops import dispatch, sparse_attention

CPU = torch.device("cpu")


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)


@pytest.fixture
def replace_chunked(monkeypatch, without_triton):
    """Let ``change`` spoil what the chunked backend returns."""

    def replace(change):
        def spoiled(*inputs, impl, **arguments):
            output = sparse_attention(*inputs, impl=impl, **arguments)
            return change(output) if impl == "chunked" else output

        monkeypatch.setattr(command, "sparse_attention", spoiled)

    return replace


def test_report(capsys, monkeypatch, without_triton):
    monkeypatch.delitem(sys.modules, command.__name__)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("hf_sparse_attention", run_name="__main__")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"hf_sparse_attention {hf_sparse_attention.__version__}\n")
    for package in ("torch", "transformers", "entmax"):
        assert re.search(rf"^  {package} +{re.escape(importlib.metadata.version(package))}$", out, re.MULTILINE)
    assert re.search(r"^  triton +not available: the package triton is not installed$", out, re.MULTILINE)
    assert re.search(r"^  chunked +available$", out, re.MULTILINE)
    rows = re.findall(r"^  (\w+) +(float32|bfloat16) +([\d.]+) +([\d.e-]+) +([\d.e-]+) .* pass$", out, re.MULTILINE)
    assert [row[:3] for row in rows] == [
        (backend, dtype, alpha)
        for backend in ("chunked", "reference")
        for dtype in ("float32", "bfloat16")
        for alpha in ("1", "1.25", "1.5", "2")
    ]
    # Errors of a real comparison: neither zero nor large.
    assert all(0 < float(error) < (1e-5 if row[1] == "float32" else 1e-2) for row in rows for error in row[3:])
    assert "FAIL" not in out
    if not torch.cuda.is_available():
        assert re.search(r"^  training, generation +chunked$", out, re.MULTILINE)
    assert re.search(r"^  returned weights +reference", out, re.MULTILINE)


SPOILED = {
    "wrong output": lambda output: output * 1.001,
    "NaN": lambda output: torch.where(output > 0.5, torch.nan, output),
    "wrong gradient": lambda output: output.detach() + 0.999 * (output - output.detach()),
}


@pytest.mark.parametrize("change", SPOILED.values(), ids=SPOILED)
def test_wrong_numbers_fail(capsys, replace_chunked, change):
    replace_chunked(change)
    assert command.main() == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"^  chunked +float32 .* FAIL$", out, re.MULTILINE)) == 4
    assert len(re.findall(r"^  reference .* pass$", out, re.MULTILINE)) == 8


def test_nan_in_one_gradient_fails(monkeypatch):
    def spoiled(query, key, value, impl, **arguments):
        if impl == "chunked":
            # Adds 0, with a gradient of 0 / 0.
            value = value + (value - value).sqrt()
        return sparse_attention(query, key, value, impl=impl, **arguments)

    monkeypatch.setattr(command, "sparse_attention", spoiled)
    gradients = command._attend("chunked", 1.5, *command._inputs(CPU, torch.float32))[1:]
    assert [bool(gradient.isnan().any()) for gradient in gradients] == [False, False, True, False]
    check = command.self_check("chunked", torch.float32, 1.5, CPU)
    assert (check.passed, check.gradients) == (False, float("inf"))
    assert check.output < 1e-5


def test_a_backend_that_breaks_fails(capsys, replace_chunked):
    def broken(output):
        raise RuntimeError("no kernel image\nis available")

    replace_chunked(broken)
    assert command.main() == 1
    out = capsys.readouterr().out
    assert out.count("did not run: RuntimeError: no kernel image FAIL") == 8
    assert len(re.findall(r"^  reference .* pass$", out, re.MULTILINE)) == 8


def test_slower_paths_are_explained(monkeypatch):
    def choose_backend(impl, *inputs, **arguments):
        if impl == "triton":
            raise ValueError("impl is 'triton', but ...: they need a CUDA device; allowed: impl='auto'.")
        warnings.warn("sparse_attention takes the slower path: they do not support dropout_p.", stacklevel=1)
        return "chunked"

    monkeypatch.setattr(command, "choose_backend", choose_backend)
    assert command.automatic(CPU, dropout_p=0.1) == "chunked: the Triton kernels do not support dropout_p"
    assert command.obstacle("triton", CPU) == "the Triton kernels need a CUDA device"


def test_missing_packages_are_reported(monkeypatch):
    def version(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert command.versions() == {"torch": "1.2.3", "transformers": "1.2.3", "triton": None, "entmax": "1.2.3"}


@pytest.mark.gpu
def test_the_kernels_are_checked_and_used_on_a_gpu():
    device = torch.device("cuda")
    assert command.obstacle("triton", device) is None
    for dtype in command.TOLERANCES:
        for alpha in command.ALPHAS:
            assert command.self_check("triton", dtype, alpha, device).passed
    assert command.automatic(device) == "triton"
    expected = "reference: the Triton kernels do not support return_weights"
    # The dispatcher says why once per process.
    assert command.automatic(device, return_weights=True) in ("reference", expected)
