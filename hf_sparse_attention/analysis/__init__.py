"""What a model's attention does with a text: supports, entropies, exact zeros, length scales, per layer and head.

    model = AutoModelForCausalLM.from_pretrained(folder)          # or a softmax model after convert(model, "softmax")
    statistics = analyze(model, [tokenizer(text)["input_ids"]])
    statistics.to_dict()["support"][layer][head]                  # keys with a weight above 0, for growing n

Pictures are in :mod:`.plots` (they need matplotlib), the paper's claims about sparse attention in :mod:`.experiments`.
"""

from .capture import LayerAttention, attention_map, observe_attention
from .statistics import AttentionStatistics, analyze, by_head_type

__all__ = [
    "AttentionStatistics",
    "LayerAttention",
    "analyze",
    "attention_map",
    "by_head_type",
    "observe_attention",
]
