"""Options of synthetic.py. Each can be a flag or a line of the YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_sparse_attention.arguments import ArgumentError, parse_mapping
from hf_sparse_attention.config import PRESETS, SparseAttentionConfig
from hf_sparse_attention.data.synthetic import TASKS, Task, make_task

ARCHITECTURES = ("llama", "gemma2")
PRECISIONS = ("bf16", "no")


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass
class TaskOptions:
    """What is learned, by which model."""

    # What a continued run must be given again, beside the fields of the model's config.
    FIXED: ClassVar[tuple[str, ...]] = ("task", "task_options")

    task: str | None = field(default=None, metadata=_help(f"one of {', '.join(TASKS)}"))
    task_options: dict | str | None = field(
        default=None, metadata=_help("options of the task, e.g. '{\"alphabet\": 64}'", metavar="JSON")
    )
    train_task_options: dict | str | None = field(
        default=None,
        metadata=_help("options of the task for training rows only, e.g. '{\"density\": [0.1, 0.9]}'", metavar="JSON"),
    )
    stages: dict | str | None = field(
        default=None,
        metadata=_help(
            "options of the task for training rows in one stage after another, on top of train_task_options: a list "
            "with a value for each stage, e.g. '{\"queries\": [1, 2, 4]}'; see stage_exact",
            metavar="JSON",
        ),
    )
    attn_implementation: str = field(default="asentmax", metadata=_help(f"one of {', '.join(PRESETS)}"))
    sparse_attention: dict | str | None = field(
        default=None,
        metadata=_help(
            'fields of config.sparse_attention, e.g. \'{"position_encoding": "nape", "beta_bias_init": -4}\'',
            metavar="JSON",
        ),
    )
    architecture: str = field(
        default="llama",
        metadata=_help(
            "llama, or gemma2, the paper's, which also normalises what a layer adds; without windows and softcapping"
        ),
    )
    layers: int = field(default=2, metadata=_help("decoder layers"))
    hidden_size: int = field(default=256, metadata=_help("width"))
    intermediate_size: int = field(default=1024, metadata=_help("width of the feed-forward layers"))
    heads: int = field(default=8, metadata=_help("attention heads; their dimension is hidden_size / heads"))
    init_from: str | None = field(
        default=None,
        metadata=_help(
            "folder of a model of this recipe: train on from its weights, or with max_steps 0 only measure"
        ),
    )
    initializer_range: float = field(default=0.02, metadata=_help("standard deviation of the initial weights"))
    embedding_range: float | None = field(
        default=None, metadata=_help("that of the initial input embeddings; default: initializer_range")
    )

    def __post_init__(self) -> None:
        for name in ("task_options", "train_task_options", "stages", "sparse_attention"):
            setattr(self, name, parse_mapping(name, getattr(self, name)))
        if self.task is None:
            raise ArgumentError(f"task: none given; allowed: {', '.join(TASKS)}")
        if self.attn_implementation not in PRESETS:
            raise ArgumentError(f"attn_implementation is {self.attn_implementation!r}; allowed: {', '.join(PRESETS)}")
        _check(self.architecture in ARCHITECTURES, "architecture", self.architecture, ", ".join(ARCHITECTURES))
        for name in ("layers", "hidden_size", "intermediate_size", "heads"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("initializer_range", "embedding_range"):
            value = getattr(self, name)
            _check(value is None or value > 0, name, value, "above 0")
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ArgumentError(
                f"hidden_size is {self.hidden_size} with {self.heads} heads; allowed: an even number per head"
            )
        try:
            evaluated, trained = self.evaluated_task(), self.trained_tasks()
            settings = {**(self.sparse_attention or {}), "preset": self.attn_implementation}
            SparseAttentionConfig.from_dict(settings).num_alibi_heads(self.heads)
        except (TypeError, ValueError) as error:
            raise ArgumentError(str(error)) from error
        for task in trained:
            if evaluated.vocab_size != task.vocab_size:
                raise ArgumentError(
                    f"train_task_options, stages: the vocabulary has {task.vocab_size} tokens in training and "
                    f"{evaluated.vocab_size} in the evaluation; put what changes it into task_options"
                )

    def trained_task(self) -> Task:
        """That of the last stage."""
        return self.trained_tasks()[-1]

    def trained_tasks(self) -> list[Task]:
        """The task of each stage, or the only one."""
        options, stages = {**(self.task_options or {}), **(self.train_task_options or {})}, self.stages or {}
        counts = {name: len(values) if isinstance(values, list) else 0 for name, values in stages.items()}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise ArgumentError(f"stages is {stages}; allowed: for each option a list with a value for each stage")
        number = max(counts.values(), default=1)
        return [
            make_task(self.task, **{**options, **{name: values[i] for name, values in stages.items()}})
            for i in range(number)
        ]

    def evaluated_task(self) -> Task:
        return self._with_own_words(1)

    def validated_task(self) -> Task:
        """As the evaluated one, with rows of none of its words."""
        return self._with_own_words(2)

    def _with_own_words(self, pool_seed: int) -> Task:
        """As in the paper, whose test rows of associative recall have words of their own."""
        options = dict(self.task_options or {})
        if self.task == "mqmtar":
            options.setdefault("pool_seed", pool_seed)
        return make_task(self.task, **options)


@dataclass
class TrainOptions:
    """How it is trained."""

    output_dir: str | None = field(default=None, metadata=_help("folder for model, card, curve and results.json"))
    seed: int = field(default=0, metadata=_help("of weights and training rows"))
    train_lengths: list[int] | None = field(
        default=None, metadata=_help("shortest and longest source; default: the paper's for the task")
    )
    batch_size: int = field(default=128, metadata=_help("rows per step"))
    max_steps: int | None = field(default=None, metadata=_help("optimizer steps"))
    max_seconds: float | None = field(
        default=None,
        metadata=_help("seconds of training, compilation not counted; with max_steps, what comes first ends it"),
    )
    learning_rate: float = field(default=1e-3, metadata=_help("peak learning rate"))
    final_learning_rate: float = field(default=0.0, metadata=_help("share of it at the end of the cosine"))
    warmup_steps: int = field(default=500, metadata=_help("steps of linear warm-up"))
    scale_lr_multiplier: float = field(
        default=1.0, metadata=_help("factor of the learning rate for the length scale's parameters")
    )
    query_jitter: float = field(
        default=1.0,
        metadata=_help(
            "in training the queries of each row are multiplied by a number from this to 1, so that what is learned "
            "does not need scores as sharp as they are; 1: no"
        ),
    )
    start_dropout: float = field(
        default=0.0,
        metadata=_help(
            "share of the training rows that lack the token that begins a row: what queries give to it falls as the "
            "length grows, so that nothing should depend on how much that is"
        ),
    )
    adam_beta1: float = field(default=0.9, metadata=_help("AdamW beta1"))
    adam_beta2: float = field(default=0.99, metadata=_help("AdamW beta2"))
    weight_decay: float = field(default=0.0, metadata=_help("of weights; never of norms, biases and length scale"))
    max_grad_norm: float = field(default=1.0, metadata=_help("clip gradients to this norm"))
    curriculum: float = field(
        default=0.0, metadata=_help("share of the training in which the longest source grows to its full length")
    )
    curriculum_length: int | None = field(
        default=None, metadata=_help("longest source at the start of the curriculum; default: the shortest")
    )
    stage_lengths: list[int] | None = field(
        default=None, metadata=_help("longest source of each stage; default: no limit of its own")
    )
    stage_exact: float = field(
        default=0.9,
        metadata=_help("a stage ends when this share of the rows between two lines of the log has been right"),
    )
    alpha_start: float = field(default=1.0, metadata=_help("entmax exponent at the start when alpha_share is above 0"))
    alpha_share: float = field(
        default=0.0, metadata=_help("share of the training in which alpha moves to its configured value")
    )
    alpha_stages: int = field(default=8, metadata=_help("steps in which it does: a captured graph has one alpha"))
    mixed_precision: str = field(default="bf16", metadata=_help("bf16 (autocast; weights stay float32) or no"))
    cuda_graph: bool = field(default=True, metadata=_help("capture the step in a CUDA graph; no effect on the CPU"))
    compile: bool = field(
        default=False,
        metadata=_help(
            "torch.compile the last stage at its full length: half a minute, then steps in half the time; "
            "no effect on the CPU"
        ),
    )
    pad_multiple: int = field(
        default=16,
        metadata=_help("rows of a curriculum are padded to sources of a multiple of this; a graph for each"),
    )
    logging_steps: int = field(default=50, metadata=_help("steps between two lines of metrics.jsonl"))
    validation_multiple: float = field(
        default=0.0,
        metadata=_help(
            "keep the weights that solve the most rows at this multiple of the longest training source, of those the "
            "ones with the most tokens right, then the later ones; 0: keep the last. Not before alpha is reached"
        ),
    )
    validation_steps: int = field(
        default=1000, metadata=_help("steps between two looks at that length, which come with a line of the log")
    )
    validation_samples: int = field(default=500, metadata=_help("rows that are looked at; none is a test row"))
    save_steps: int = field(default=0, metadata=_help("steps between two checkpoints; 0: only when a signal stops it"))
    resume: str | None = field(default=None, metadata=_help("latest: go on with the run in output_dir"))

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ArgumentError("output_dir: none given")
        if self.max_steps is None and self.max_seconds is None:
            raise ArgumentError("give max_steps, max_seconds, or both")
        _check(self.max_steps is None or self.max_steps >= 0, "max_steps", self.max_steps, "at least 0")
        for name in (
            "batch_size",
            "alpha_stages",
            "pad_multiple",
            "logging_steps",
            "validation_steps",
            "validation_samples",
        ):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_seconds", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _check(value is None or value > 0, name, value, "above 0")
        multiple = self.validation_multiple
        _check(multiple == 0 or 1 <= multiple < math.inf, "validation_multiple", multiple, "0, and 1 or more")
        for name in ("warmup_steps", "weight_decay", "scale_lr_multiplier", "save_steps"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("final_learning_rate", "curriculum", "alpha_share", "stage_exact"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        # Rows that are measured have the token.
        _check(0 <= self.start_dropout < 1, "start_dropout", self.start_dropout, "from 0 up to, not including, 1")
        _check(0 < self.query_jitter <= 1, "query_jitter", self.query_jitter, "above 0 and up to 1")
        _check(1 <= self.alpha_start <= 2, "alpha_start", self.alpha_start, "1 to 2")
        _check(self.mixed_precision in PRECISIONS, "mixed_precision", self.mixed_precision, ", ".join(PRECISIONS))
        _check(self.resume in (None, "latest"), "resume", self.resume, "latest")
        lengths = self.train_lengths
        if lengths is not None and not (len(lengths) == 2 and 1 <= lengths[0] <= lengths[1]):
            raise ArgumentError(f"train_lengths is {lengths}; allowed: the shortest and the longest")

    def lengths(self, task: Task) -> tuple[int, int]:
        low, high = self.train_lengths or task.train_lengths
        return low, high

    def all_stages(self, tasks: list[Task]) -> list[Task]:
        """The task of each stage where ``stage_lengths`` may be what makes them.

        Raises:
            ArgumentError: ``stage_lengths`` does not fit the tasks.
        """
        lengths = self.stage_lengths
        if lengths is None:
            return tasks
        low, high = self.lengths(tasks[-1])
        if len(tasks) not in (1, len(lengths)) or not all(low <= longest <= high for longest in lengths):
            raise ArgumentError(
                f"stage_lengths is {lengths}; allowed: {len(tasks) if len(tasks) > 1 else 'some'} lengths "
                f"of {low} to {high}, one for each stage"
            )
        return tasks if len(tasks) > 1 else tasks * len(lengths)


@dataclass
class EvalOptions:
    """How the trained model is measured and kept."""

    multiples: list[float] = field(
        default_factory=lambda: [float(2**i) for i in range(11)],
        metadata=_help("lengths as multiples of the longest training source"),
    )
    samples: int = field(default=1000, metadata=_help("samples per length up to full_length; none: no evaluation"))
    full_length: int = field(default=4096, metadata=_help("beyond it samples fall with the length"))
    min_samples: int = field(default=32, metadata=_help("fewest samples of a length"))
    batch_tokens: int = field(default=131072, metadata=_help("about how many tokens go through the model at once"))
    generate: int = field(
        default=4, metadata=_help("samples per length that are generated too, to check the way exact match is decided")
    )
    eval_seconds: float | None = field(default=None, metadata=_help("longer lengths are left out after so long"))
    eval_seed: int = field(default=1, metadata=_help("of the samples"))
    save_model: bool = field(default=True, metadata=_help("keep the weights"))
    save_dtype: str = field(default="float32", metadata=_help("float32 or bfloat16"))

    def __post_init__(self) -> None:
        within = all(0 < multiple < math.inf for multiple in self.multiples)
        _check(within, "multiples", self.multiples, "above 0 and finite")
        for name in ("samples", "generate"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("full_length", "min_samples", "batch_tokens"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(self.save_dtype in ("float32", "bfloat16"), "save_dtype", self.save_dtype, "float32, bfloat16")


def _check(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ArgumentError(f"{name} is {value}; allowed: {allowed}")
