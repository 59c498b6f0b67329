"""The model of synthetic.py and its training loss, with what is done to the model while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from synthetic_options import TaskOptions
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_sparse_attention.arguments import ArgumentError
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.data.synthetic import BOS, EOS, IGNORED_LABEL, PAD
from hf_sparse_attention.evaluation.synthetic import target_index


def model_config(options: TaskOptions) -> PreTrainedConfig:
    """The architecture for the task's vocabulary, with the attention of the options."""
    common = {
        "vocab_size": options.trained_task().vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "max_position_embeddings": 1 << 18,
        "initializer_range": options.initializer_range,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "attn_implementation": options.attn_implementation,
        "sparse_attention": options.sparse_attention or {},
    }
    if options.architecture == "llama":
        return AutoConfig.for_model("llama", **common)
    head_dim = options.hidden_size // options.heads
    return AutoConfig.for_model(
        "gemma2",
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        layer_types=["full_attention"] * options.layers,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        **common,
    )


def build_model(options: TaskOptions) -> PreTrainedModel:
    """A model with the architecture and the attention of the options, float32, new or from ``init_from``.

    Raises:
        ArgumentError: the model of ``init_from`` cannot be read, or differs from the options.
    """
    config = model_config(options)
    if options.init_from is None:
        model = AutoModelForCausalLM.from_config(config)
        if options.embedding_range is not None:
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(options.embedding_range / options.initializer_range)
        return model
    if not (Path(options.init_from) / "config.json").is_file():
        raise ArgumentError(f"init_from: {options.init_from} holds no model")
    try:
        model = AutoModelForCausalLM.from_pretrained(options.init_from, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"init_from: {options.init_from} cannot be loaded: {error}") from error
    wanted = SparseAttentionConfig.from_dict(options.sparse_attention, preset=options.attn_implementation).to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = ("model_type", *sizes)
    pairs = {name: (getattr(model.config, name), getattr(config, name)) for name in fields}
    pairs |= {f"sparse_attention.{name}": (model.config.sparse_attention[name], wanted[name]) for name in wanted}
    for name, (stored, asked) in pairs.items():
        if stored != asked:
            raise ArgumentError(f"init_from: the model has {name} {stored!r}, the options say {asked!r}")
    return model


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """What ``model.model(input_ids, use_cache=False)`` gives for rows without padding before their tokens, (B, L, H).

    Layer by layer, because while a graph is captured transformers would make a dense mask, which reads the device.
    """
    decoder = model.model
    hidden = decoder.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    rotation = decoder.rotary_emb(hidden, position_ids=positions)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotation, use_cache=False)
    return decoder.norm(hidden)


def target_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean loss over the labels, of which a row has at most ``count``, and the share of rows that have all right."""
    hidden = last_hidden_states(model, input_ids)
    index, wanted = target_index(labels, count)
    hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = model.lm_head(hidden).float()
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED_LABEL)
    right = (logits.argmax(-1) == wanted) | (wanted == IGNORED_LABEL)
    return loss, right.all(1).float().mean()


class _FusedNorm(LlamaRMSNorm):
    """The same in one kernel where PyTorch has one, instead of five and their backward."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class _FusedGemmaNorm(Gemma2RMSNorm):
    """The same for the norm whose weights are around 0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)


_FUSED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    LlamaRMSNorm: _FusedNorm,
    Gemma2RMSNorm: _FusedGemmaNorm,
}


@contextlib.contextmanager
def fused_norms(model: PreTrainedModel) -> Iterator[None]:
    """Norms are fused in here; afterwards the model computes as transformers writes it."""
    norms = [(module, type(module)) for module in model.modules() if type(module) in _FUSED]
    try:
        for module, kind in norms:
            module.__class__ = _FUSED[kind]
        yield
    finally:
        for module, kind in norms:
            module.__class__ = kind


class _ScaledLinear(torch.nn.Linear):
    """Output times ``factor``, which holds a number for each row."""

    factor: Tensor

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output * self.factor.to(output.dtype)


@contextlib.contextmanager
def scaled_queries(model: PreTrainedModel, factor: Tensor) -> Iterator[None]:
    """In here the queries of each row are multiplied by its ``factor``, (B, 1, 1)."""
    projections = [layer.self_attn.q_proj for layer in model.model.layers]
    try:
        for module in projections:
            module.__class__, module.factor = _ScaledLinear, factor
        yield
    finally:
        for module in projections:
            module.__class__ = torch.nn.Linear
            del module.factor
