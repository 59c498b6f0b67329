"""How float32 matrices are multiplied on a GPU: a setting of PyTorch's, which has two interfaces."""

import torch


def multiplies_in_tf32() -> bool:
    """Whether products of float32 matrices on a GPU may be rounded to TF32, 10 bits.

    Since PyTorch 2.9, where ``torch.backends.fp32_precision`` is set (``TrainingArguments(tf32=True)`` or
    ``torch_compile=True`` do), asking for the older ``allow_tf32`` raises RuntimeError.
    """
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
