"""Model cards with the metadata of the Hub, filled from the model's config and the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .config import PRESETS

TEMPLATE = Path(__file__).with_name("model_card_template.md")
_ARCHITECTURE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_NAMES = {
    "asentmax": "ASEntmax attention",
    "entmax": "alpha-entmax attention",
    "ssmax": "Scalable-Softmax attention",
    "softmax": "softmax attention",
    "topk": "top-k softmax attention",
}
_RESULTS = re.compile(r"(^## Results\n).*?(?=^## )", re.MULTILINE | re.DOTALL)
_LOADED = re.compile(r'from_pretrained\("([^"]+)"')


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    Args:
        metric: metric identifier, e.g. ``perplexity``.
        value: the number.
        dataset: readable name of the data, with the length where it matters.
        script: what made the number.
        hub_dataset: identifier of the data set, if it is on the Hub.
        split: split of the data set.
    """

    metric: str
    value: float
    dataset: str
    script: str
    hub_dataset: str | None = None
    split: str | None = None

    def eval_result(self) -> EvalResult:
        """As an entry of the Hub's ``model-index``."""
        return EvalResult(
            task_type="text-generation",
            dataset_type=self.hub_dataset or "text",
            dataset_name=self.dataset,
            dataset_split=self.split,
            metric_type=self.metric,
            metric_value=self.value,
        )


def create_model_card(
    config: PreTrainedConfig,
    *,
    repo_id: str,
    parameters: int,
    training: Mapping[str, Any],
    training_length: int,
    results: Sequence[Measurement] = (),
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    license: str | None = None,
    language: str | None = "en",
    template: str | Path = TEMPLATE,
) -> ModelCard:
    """Fill the model card.

    Args:
        config: of the model; its ``sparse_attention`` field gives the attention section.
        repo_id: what a reader passes to ``from_pretrained``.
        parameters: number of parameters.
        training: rows of the training table.
        training_length: tokens per training row.
        results: what was measured, for the table and the ``model-index``.
        datasets: identifiers on the Hub of the training data; files that are not there belong into ``training``.
        base_model: identifier on the Hub of the checkpoint that was patched.
    """
    model_name = repo_id.rstrip("/").rsplit("/", 1)[-1]
    settings = getattr(config, "sparse_attention", None)
    preset = settings["preset"] if settings else None
    tags = ["sparse-attention", *([preset] if preset in PRESETS else [])]
    data = ModelCardData(
        model_name=model_name,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=list(datasets) or None,
        tags=tags,
        eval_results=[result.eval_result() for result in results] or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(template),
        model_name=model_name,
        repo_id=repo_id,
        architecture=config.model_type,
        parameters=_count(parameters),
        attention=_NAMES.get(preset, "the stock attention of transformers"),
        training_length=training_length,
        attention_settings=settings or {"attn_implementation": config._attn_implementation},
        architecture_settings={
            name: getattr(config, name) for name in _ARCHITECTURE_FIELDS if getattr(config, name, None) is not None
        },
        training={name: _cell(value) for name, value in training.items() if value is not None},
        results=_results_table(results),
    )


def replace_results(card: ModelCard, results: Sequence[Measurement], repo_id: str | None = None) -> ModelCard:
    """The same card with these measurements, in its table and in the ``model-index``, instead of those it has.

    Args:
        card: made by :func:`create_model_card`.
        repo_id: what a reader passes to ``from_pretrained``; None leaves it and the model's name as they are.

    Raises:
        ValueError: the card has no section of results, or no ``from_pretrained`` to put the ``repo_id`` into.
    """
    parts = _RESULTS.split(card.text)
    if len(parts) != 3:
        raise ValueError("the card has no section '## Results'")
    before, heading, after = parts
    text = f"{before}{heading}\n{_results_table(results)}\n\n{after}"
    if repo_id is not None:
        old = _LOADED.search(text)
        if old is None:
            raise ValueError("the card has no from_pretrained(...)")
        name = repo_id.rstrip("/").rsplit("/", 1)[-1]
        text = text.replace(f'"{old[1]}"', f'"{repo_id}"').replace(f"# {card.data.model_name}\n", f"# {name}\n", 1)
        card.data.model_name = name
    card.data.eval_results = [result.eval_result() for result in results]
    card.text = text
    return card


def _results_table(results: Sequence[Measurement]) -> str:
    """One row per measurement; empty without any."""
    if not results:
        return ""
    rows = [f"| {r.dataset} | {r.metric} | {r.value:.4g} | `{r.script}` |" for r in results]
    return "\n".join(["| data | metric | value | made by |", "| --- | --- | --- | --- |", *rows])


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
