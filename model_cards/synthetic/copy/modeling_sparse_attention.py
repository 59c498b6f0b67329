"""Loads this checkpoint with trust_remote_code=True; hf_sparse_attention must be installed."""

import transformers
from hf_sparse_attention.hub import TrustedCheckpoint


class Gemma2Model(TrustedCheckpoint, transformers.Gemma2Model):
    pass


class Gemma2ForCausalLM(TrustedCheckpoint, transformers.Gemma2ForCausalLM):
    pass


class Gemma2ForSequenceClassification(TrustedCheckpoint, transformers.Gemma2ForSequenceClassification):
    pass


class Gemma2ForTokenClassification(TrustedCheckpoint, transformers.Gemma2ForTokenClassification):
    pass
