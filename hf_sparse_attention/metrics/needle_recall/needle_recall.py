"""Share of the answers found in the generated text, RULER's ``string_match_all`` (arXiv 2404.06654)."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = """
Recall of needle-in-a-haystack answers: for each sample, the share of its answers that occur in the generated text
(upper and lower case alike), then the mean over the samples: with one answer per sample, the share of needles found.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): generated texts.
    references (list of list of str): the answers of each sample; all of them are wanted.
    exact (bool): the text must equal the only answer, surrounding space and a final full stop aside. Default: false.
Returns:
    needle_recall (float): between 0 and 1.
    per_sample (list of float): the recall of each sample.
Examples:
    >>> metric = evaluate.load(metric_path("needle_recall"))
    >>> metric.compute(predictions=[" 4821.", " 17"], references=[["4821"], ["9"]])
    {'needle_recall': 0.5, 'per_sample': [1.0, 0.0]}
"""

_CITATION = """
@inproceedings{hsieh2024ruler,
  title={RULER: What's the Real Context Size of Your Long-Context Language Models?},
  author={Hsieh, Cheng-Ping and Sun, Simeng and Kriman, Samuel and Acharya, Shantanu and Rekesh, Dima and Jia, Fei
          and Zhang, Yang and Ginsburg, Boris},
  booktitle={Conference on Language Modeling},
  year={2024},
  url={https://arxiv.org/abs/2404.06654}
}
"""


class NeedleRecall(evaluate.Metric):
    """``needle_recall`` as an ``evaluate`` metric."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://arxiv.org/abs/2404.06654"],
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], exact: bool = False
    ) -> dict[str, float | list[float]]:
        scores = [_recall(text, answers, exact) for text, answers in zip(predictions, references, strict=True)]
        return {"needle_recall": sum(scores) / len(scores), "per_sample": scores}


def _recall(text: str, answers: Sequence[str], exact: bool) -> float:
    if not answers:
        raise ValueError("references: every sample needs at least one answer, got an empty list.")
    if exact:
        if len(answers) > 1:
            raise ValueError(f"exact: needs one answer per sample, got {len(answers)}: {list(answers)!r}.")
        return float(text.strip().removesuffix(".").lower() == answers[0].strip().lower())
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)
