"""Every Triton kernel once on small odd shapes, for compute-sanitizer; `make sanitize-gpu` runs all of its tools.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/ops/sanitize_kernels.py

Without PyTorch's memory cache every tensor is an allocation of its own, whose ends are watched.
"""

from typing import Any

import torch

from hf_sparse_attention.ops import sparse_attention

BF16 = torch.bfloat16
# Batch, query heads, key heads, query length, key length, head dimension, dtype; then arguments of the operator.
TRAINING: list[tuple[tuple[int, int, int, int, int, int, torch.dtype], dict[str, Any]]] = [
    ((1, 2, 1, 1, 1, 64, BF16), {"is_causal": True}),
    ((2, 4, 2, 131, 131, 64, BF16), {"is_causal": True}),
    ((2, 2, 1, 100, 200, 128, torch.float16), {"is_causal": True, "slopes": torch.tensor([0.5, 0.1])}),
    ((1, 2, 1, 70, 70, 32, BF16), {"query_scale": torch.rand(1, 2, 70) + 0.5, "alpha": 1.25}),
    ((1, 2, 2, 333, 517, 80, torch.float16), {"is_causal": True}),
    ((1, 3, 1, 257, 257, 96, torch.float32), {}),
    ((1, 2, 2, 200, 200, 128, BF16), {"is_causal": True, "sliding_window": 37}),
    ((1, 4, 1, 131, 131, 32, BF16), {"is_causal": True, "cu_seqlens": torch.tensor([0, 1, 64, 65, 131])}),
    ((2, 2, 1, 17, 256, 96, torch.float16), {"alpha": 2.0, "slopes": torch.tensor([0.5, 0.1])}),
    ((1, 2, 2, 300, 300, 16, BF16), {"is_causal": True, "alpha": 1.25}),
    ((1, 2, 2, 300, 300, 32, BF16), {"is_causal": True, "alpha": 2.0}),
    ((1, 2, 2, 300, 300, 64, BF16), {"is_causal": True, "alpha": 1.0}),
    ((1, 2, 2, 300, 300, 256, BF16), {"is_causal": True}),
    ((1, 2, 2, 2200, 2200, 64, BF16), {"is_causal": True}),
    ((1, 2, 1, 700, 700, 64, BF16), {"is_causal": True, "slopes": torch.tensor([0.5, 0.1])}),
    ((1, 2, 1, 400, 400, 64, BF16), {"is_causal": True, "cu_seqlens": torch.tensor([0, 3, 130, 131, 400])}),
    ((1, 2, 1, 400, 400, 64, BF16), {"is_causal": True, "query_scale": torch.rand(1, 2, 400) + 0.5}),
]
DECODING = [(1, 1), (1, 777), (5, 3001), (16, 129)]


def main() -> None:
    torch.manual_seed(0)
    for (batch, heads, key_heads, queries, keys, dim, dtype), arguments in TRAINING:
        sizes = [(batch, heads, queries, dim)] + [(batch, key_heads, keys, dim)] * 2
        tensors = [torch.randn(size, device="cuda", dtype=dtype, requires_grad=True) for size in sizes]
        arguments = {name: value.cuda() if torch.is_tensor(value) else value for name, value in arguments.items()}
        sparse_attention(3 * tensors[0], *tensors[1:], impl="triton", **arguments).square().sum().backward()
        if not all(torch.isfinite(tensor.grad).all() for tensor in tensors):
            raise SystemExit(f"gradients of {sizes[0]} are not finite")
    for queries, keys in DECODING:
        query, key, value = (torch.randn(2, h, n, 64, device="cuda") for h, n in ((8, queries), (2, keys), (2, keys)))
        with torch.no_grad():
            out = sparse_attention(query.to(BF16), key.to(BF16), value.to(BF16), impl="triton", is_causal=True)
        if not torch.isfinite(out).all():
            raise SystemExit(f"decoding {queries} of {keys} is not finite")
    print(f"{len(TRAINING)} cases of training and {len(DECODING)} of decoding ran")


if __name__ == "__main__":
    main()
