"""Scores a checkpoint with EleutherAI's harness on the YAML tasks of a folder; imports none of this project's code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BATCH_SIZE = 4


def harness_scores(checkpoint: Path | str, tasks: Path | str, **model_args: Any) -> dict[str, list[Any]]:
    """Responses of the model by task, documents in the order of the data file.

    A document of a multiple-choice task has one log-likelihood per choice, one of a rolling task a single one.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu", **model_args},
        tasks=sorted(path.stem for path in Path(tasks).glob("*.yaml")),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=BATCH_SIZE,
        bootstrap_iters=0,
    )
    return {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in results["samples"].items()
    }


if __name__ == "__main__":
    imported_before = "hf_sparse_attention" in sys.modules
    scores = harness_scores(*sys.argv[1:], trust_remote_code=True)
    print(json.dumps({"imported before": imported_before, "scores": scores}))
