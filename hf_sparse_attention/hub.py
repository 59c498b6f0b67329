"""The few lines of code that a checkpoint carries, so that ``trust_remote_code=True`` loads it without an import.

``config.json`` of a model with a preset has an ``auto_map`` into ``modeling_sparse_attention.py``, which imports this
package and subclasses transformers' own model classes under their own names. Loading with this package imported needs
no trust and ignores the file, since transformers knows the architecture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from .config import PRESETS, for_preset, merge_settings

REMOTE_CODE_FILE = "modeling_sparse_attention.py"
_MODULE = Path(REMOTE_CODE_FILE).stem

# Loaders that a supported architecture may have a class for.
_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)
_HEADER = '''"""Loads this checkpoint with trust_remote_code=True; hf_sparse_attention must be installed."""

import transformers
from hf_sparse_attention.hub import TrustedCheckpoint
'''
_CLASS = """

class {name}(TrustedCheckpoint, transformers.{name}):
    pass
"""


class TrustedCheckpoint:
    """First base of the classes in a checkpoint's remote-code file."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args: Any,
        config: PreTrainedConfig | str | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """As in transformers; a ``sparse_attention`` given at loading time changes single fields of the stored one.

        Without this, a config that was read before this package was imported would have lost the other fields.
        """
        if isinstance(config, PreTrainedConfig):
            given = kwargs.pop("sparse_attention", None) or config.sparse_attention
            stored, _ = config.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if given is not None:
                given = for_preset(given, config._attn_implementation)
                config.sparse_attention = merge_settings(stored.get("sparse_attention"), given)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)


def update_remote_code(config: PreTrainedConfig, folder: str | Path) -> None:
    """Make ``config.auto_map`` fit the attention that ``config`` asks for, and write the file it names.

    Entries of ``auto_map`` that name other files are kept.

    Args:
        config: about to be written to ``folder``.
        folder: exists.
    """
    entries = dict(getattr(config, "auto_map", None) or {})
    entries = {key: value for key, value in entries.items() if not str(value).startswith(f"{_MODULE}.")}
    if getattr(config, "attn_implementation", None) in PRESETS:
        names = {key: name for key, name in _model_classes(config).items() if key not in entries}
        if names:
            entries |= {key: f"{_MODULE}.{name}" for key, name in names.items()}
            code = _HEADER + "".join(_CLASS.format(name=name) for name in dict.fromkeys(names.values()))
            Path(folder, REMOTE_CODE_FILE).write_text(code, encoding="utf-8")
    if entries:
        config.auto_map = entries
    else:
        config.__dict__.pop("auto_map", None)


def _model_classes(config: PreTrainedConfig) -> dict[str, str]:
    """Names of the Auto classes that know ``config``, and of the model class that each would build."""
    found = {}
    for auto_name in _AUTO_CLASSES:
        mapping = getattr(transformers, auto_name)._model_mapping
        name = mapping[type(config)].__name__ if type(config) in mapping else None
        # A class that was registered by a user is not transformers' to subclass.
        if name is not None and getattr(transformers, name, None) is mapping[type(config)]:
            found[auto_name] = name
    return found
