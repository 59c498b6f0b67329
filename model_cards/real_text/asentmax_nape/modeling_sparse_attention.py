"""Loads this checkpoint with trust_remote_code=True; hf_sparse_attention must be installed."""

import transformers
from hf_sparse_attention.hub import TrustedCheckpoint


class LlamaModel(TrustedCheckpoint, transformers.LlamaModel):
    pass


class LlamaForCausalLM(TrustedCheckpoint, transformers.LlamaForCausalLM):
    pass


class LlamaForSequenceClassification(TrustedCheckpoint, transformers.LlamaForSequenceClassification):
    pass


class LlamaForTokenClassification(TrustedCheckpoint, transformers.LlamaForTokenClassification):
    pass


class LlamaForQuestionAnswering(TrustedCheckpoint, transformers.LlamaForQuestionAnswering):
    pass
