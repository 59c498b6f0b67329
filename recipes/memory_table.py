"""Memory of Llama models with ASEntmax by length and number of GPUs, calculated: the tables of SCALING.md.

    python recipes/memory_table.py            # prints the tables
    python recipes/memory_table.py --write    # puts them into SCALING.md

All sizes are bytes unless a name says otherwise. Weights and optimizer state are float32, computation is bfloat16.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

GIB, KIB = 2**30, 2**10
GPU_GIB = 80
PAGE = Path(__file__).parent / "SCALING.md"
BEGIN, END = "<!-- memory_table.py -->\n", "<!-- end of memory_table.py -->\n"
LENGTHS = (2**11, 2**13, 2**15, 2**17, 2**20)
# Queries and keys of one tile of the Triton kernels, for head dimensions up to 128.
TILE = 128
# Bytes in which the sweep keeps what it found, for each tile of queries and up to 128 tiles of keys.
SCRATCH = 8 * 4
# What sharding leaves on every GPU while it computes: bfloat16 weights and their gradients.
GATHERED = 2 + 2


@dataclass(frozen=True)
class Shape:
    """A Llama model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def scale_parameters(self) -> int:
        """Parameters of the length scale: two projections of the hidden states to heads, with biases."""
        return self.num_hidden_layers * 2 * self.num_attention_heads * (self.hidden_size + 1)

    @property
    def layer_parameters(self) -> int:
        query, keys = self.hidden_size**2, 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        own = 2 * query + keys + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return own + self.scale_parameters // self.num_hidden_layers

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def parameters(self) -> int:
        return self.num_hidden_layers * self.layer_parameters + self.embedding_parameters + self.hidden_size

    @property
    def cache_per_token(self) -> int:
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim * 2

    @property
    def logits_per_token(self) -> int:
        """In training: bfloat16 logits, transformers' float32 copy of them, and its gradient."""
        return self.vocab_size * (2 + 4 + 4)

    @property
    def layer_per_token(self) -> int:
        """What one layer keeps for its backward, and the widest gradients there, without tile lists."""
        heads, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        norms = 2 * (4 + 2) * self.hidden_size
        projections = 2 * (heads + 2 * keys) + 2 * (heads + keys)
        # Four numbers of the kernel, t, beta and gamma, and the gradient of t, in float32.
        attention = 2 * heads + 2 * heads + self.num_attention_heads * (16 + 4 * 4)
        feed_forward = 2 * (4 + 3) * self.intermediate_size
        return norms + projections + attention + feed_forward


SHAPES = {
    "120M": Shape(768, 2048, 15, 12, 4, 32768, True),
    "420M": Shape(1024, 2816, 30, 16, 8, 32768, False),
    "1.2B": Shape(2048, 8192, 16, 32, 8, 128256, True),
    "8B": Shape(4096, 14336, 32, 32, 8, 128256, False),
    "70B": Shape(8192, 28672, 80, 64, 8, 128256, False),
}
TRAINING = (
    ("120M", "one GPU", 1),
    ("420M", "one GPU", 1),
    ("1.2B", "one GPU", 1),
    ("420M", "DDP", 8),
    ("1.2B", "DDP", 8),
    ("1.2B", "FSDP2", 8),
    ("8B", "FSDP2", 8),
    ("8B", "FSDP2", 64),
    ("70B", "FSDP2", 64),
    ("70B", "FSDP2", 256),
)
GENERATION = (("1.2B", 1), ("8B", 1), ("8B", 2), ("70B", 4), ("70B", 8))


def attention_extra(batch: int, heads: int, length: int, head_dim: int) -> int:
    """Peak of the Triton kernels over forward and backward beside inputs, output and gradients."""
    rows = batch * heads * length
    tiles = -(-length // TILE)
    # What the backward reads of each row lies packed, six numbers of 4 bytes.
    mean, numbers, packed = 2 * rows * head_dim, 16 * rows, 24 * rows
    lists = batch * heads * (tiles**2 * (2 + 2 + 1) + 2 * tiles * 4)
    return mean + numbers + packed + lists + 2 * 4 * length


def tile_lists(heads: int, length: int, training: bool) -> int:
    """Lists of one layer's forward; the backward needs less. Grows with the square of the length."""
    tiles = -(-length // TILE)
    return heads * (tiles**2 * (2 + 4 + (1 if training else 0)) + tiles * min(tiles, 128) * SCRATCH)


def training_bytes(shape: Shape, kind: str, gpus: int, length: int) -> int:
    """One row of ``length`` tokens on each GPU, with checkpointing of every layer."""
    if kind == "FSDP2":
        state = 16 * shape.parameters // gpus + GATHERED * (2 * shape.layer_parameters + shape.embedding_parameters)
        residual = 2
    else:
        # Autocast keeps bfloat16 weights beside the others and the residual stream in float32; DDP has buckets.
        state = (16 + 2 + (4 if kind == "DDP" else 0)) * shape.parameters
        residual = 4
    per_token = residual * shape.num_hidden_layers * shape.hidden_size
    # The logits are gone when the backward reaches the layers.
    per_token += max(shape.logits_per_token, shape.layer_per_token)
    return state + length * per_token + tile_lists(shape.num_attention_heads, length, training=True)


def generation_bytes(shape: Shape, gpus: int, length: int) -> tuple[int, int]:
    """Decoding one token, and reading the whole prompt at once, with tensor parallelism over the GPUs."""
    held = (2 * shape.parameters + length * shape.cache_per_token) // gpus
    scores = 4 * length * shape.num_attention_heads // gpus
    heads = (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    wide = 2 * (heads + 3 * shape.intermediate_size) // gpus + 4 * 2 * shape.hidden_size
    return held + scores, held + length * wide + tile_lists(shape.num_attention_heads // gpus, length, training=False)


def longest_row(shape: Shape, kind: str, gpus: int) -> int:
    """The longest row that fits, in multiples of 1024 tokens."""
    low, high = 0, 2**14
    while high - low > 1:
        middle = (low + high) // 2
        fits = training_bytes(shape, kind, gpus, 1024 * middle) <= GPU_GIB * GIB
        low, high = (middle, high) if fits else (low, middle)
    return 1024 * low


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def gib(size: int) -> str:
    return f"{size / GIB:,.0f}" if size >= 10 * GIB else f"{size / GIB:.1f}"


def name_of(length: int) -> str:
    return f"{length // 2**20}M" if length >= 2**20 else f"{length // 2**10}k"


def tables() -> str:
    lengths = [name_of(length) for length in LENGTHS]
    models = [
        [
            name,
            f"{shape.parameters / 1e6:,.0f}M",
            f"{shape.scale_parameters / 1e6:,.2f}M",
            gib(2 * shape.parameters),
            gib(16 * shape.parameters),
            f"{2 * shape.num_hidden_layers * shape.hidden_size / KIB:,.0f}",
            f"{shape.layer_per_token / KIB:,.0f}",
            f"{shape.logits_per_token / KIB:,.0f}",
            f"{shape.cache_per_token / KIB:,.0f}",
        ]
        for name, shape in SHAPES.items()
    ]
    training = [
        [
            f"{name}, {kind}" + ("" if gpus == 1 else f", {gpus} GPUs"),
            *[gib(training_bytes(SHAPES[name], kind, gpus, length)) for length in LENGTHS],
            f"{longest_row(SHAPES[name], kind, gpus):,}" if longest_row(SHAPES[name], kind, gpus) else "none",
        ]
        for name, kind, gpus in TRAINING
    ]
    generation = [
        [
            f"{name}, " + ("one GPU" if gpus == 1 else f"{gpus} GPUs"),
            *[" / ".join(map(gib, generation_bytes(SHAPES[name], gpus, length))) for length in LENGTHS],
        ]
        for name, gpus in GENERATION
    ]
    lists = [
        [f"{heads} heads", *[gib(tile_lists(heads, length, training=True)) for length in LENGTHS]]
        for heads in (8, 16, 32, 64)
    ]
    return "\n".join(
        [
            "Per model; GiB, then KiB per token (residual: the inputs of all layers, in bfloat16):\n",
            markdown(
                [
                    "model", "parameters", "of these length scale", "weights, bf16", "weights, gradients, AdamW",
                    "residual", "one layer", "logits", "KV cache",
                ],
                models,
            ),
            "Training, GiB per GPU for one row per GPU, checkpointing every layer:\n",
            markdown(["", *lengths, f"longest row in {GPU_GIB} GiB"], training),
            "Generation in bfloat16, GiB per GPU for one sequence, decoding / reading the prompt at once:\n",
            markdown(["", *lengths], generation),
            "Of this the tile lists of the kernels, GiB in the forward of one layer (heads of one GPU):\n",
            markdown(["", *lengths], lists),
        ]
    )  # fmt: skip


def page(text: str, new: str) -> str:
    """SCALING.md with its tables replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into SCALING.md")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
