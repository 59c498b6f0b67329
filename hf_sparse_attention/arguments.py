"""Options of the recipes: dataclasses filled from flags, from a YAML file, or from a file that flags override."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class ArgumentError(ValueError):
    """An option is unknown, of the wrong type or out of range; the message names it."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of an option where it has one and its text does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        # The second flag of an option that is true unless it is turned off comes with the text of the first.
        if options.get("action") == "store_false":
            options.update(help=f"turn {options['dest']} off", default=argparse.SUPPRESS)
        return super().add_argument(*names, **options)

    def error(self, message: str):
        raise ArgumentError(re.sub(r"^argument --(\w+)\S*:", r"\1:", message))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML where a key given twice is an error, not the last one wins."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file that holds one mapping.

    Raises:
        ArgumentError: missing, not text, not YAML, not a mapping, or a key given twice; the message names the file.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: the constructors of dates and numbers raise it bare
        raise ArgumentError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ArgumentError(f"{path}: expected 'name: value' lines, got a {type(values).__name__}")
    return values


def parse_mapping(name: str, value: str | dict | None) -> dict[str, Any] | None:
    """An option whose value is a mapping: a dict from YAML, or JSON text from a flag."""
    if value is None or isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"{name}: {value!r} is not a JSON object ({error})") from error
    if not isinstance(parsed, dict):
        raise ArgumentError(f"{name}: {value!r} is not a JSON object")
    return parsed


def parse_arguments(
    *dataclass_types: type, argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Fill the dataclasses from ``[config.yaml] [--option value ...]``; flags override the file.

    Prints a one-line message naming the file and option and exits with status 2 when something is wrong.

    Returns:
        One instance per dataclass, in order.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = Path(sys.argv[0]).name
    try:
        return parse(*dataclass_types, argv=argv, description=description)
    except ArgumentError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def parse(*dataclass_types: type, argv: Sequence[str], description: str | None = None) -> tuple[Any, ...]:
    """As `parse_arguments`, raising ArgumentError instead of leaving the program."""
    parser = _Parser(
        dataclass_types,
        description=description,
        usage="%(prog)s [config.yaml] [--option value ...]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    argv = list(argv)
    file_argv: list[str] = []
    if argv and not argv[0].startswith("-"):
        file_argv = _file_flags(parser, Path(argv.pop(0)))
    try:
        return parser.parse_args_into_dataclasses([*file_argv, *argv], look_for_args_file=False)
    except ArgumentError:
        raise
    except ValueError as error:
        unknown = re.search(r"not used by the HfArgumentParser: (\[.*\])", str(error), re.DOTALL)
        raise ArgumentError(f"unknown option: {unknown[1]}" if unknown else str(error)) from error


def _file_flags(parser: _Parser, path: Path) -> list[str]:
    """The file's values as flags, so that argparse converts and checks both alike."""
    fields = {f.name: f for dtype in parser.dataclass_types for f in dataclasses.fields(dtype)}
    flags: list[str] = []
    for name, value in load_yaml(path).items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " --help lists the options."
            raise ArgumentError(f"{path}: unknown option {name!r} (value {value!r}).{hint}")
        if value is None:
            if fields[name].default is not None:
                raise ArgumentError(f"{path}: {name}: null is not allowed")
            continue
        new = _flag(path, name, value, fields[name])
        try:
            parser.parse_known_args(new)
        except ArgumentError as error:
            if str(error).startswith(name):
                raise ArgumentError(f"{path}: {error}") from error
        flags += new
    return flags


def _flag(path: Path, name: str, value: Any, field: dataclasses.Field) -> list[str]:
    kind = field.type
    if isinstance(value, dict):
        if not _accepts_mapping(field):
            raise ArgumentError(f"{path}: {name}: takes one value, got a mapping")
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list):
        items = [str(item) for item in value]
        wrong = [item for item in value if isinstance(item, (dict, list, bool)) or item is None]
        if getattr(kind, "__origin__", kind) is not list:
            raise ArgumentError(f"{path}: {name}: takes one value, got a list: {value!r}")
        if not items or wrong or any(item.startswith("-") for item in items):
            raise ArgumentError(f"{path}: {name}: {value!r} is not a list of values")
        return [f"--{name}", *items]
    if isinstance(value, bool) and kind is not bool:
        raise ArgumentError(f"{path}: {name}: {value!r} is true or false, not {getattr(kind, '__name__', kind)}")
    if not isinstance(value, (str, int, float)):
        raise ArgumentError(f"{path}: {name}: {value!r} is a {type(value).__name__}, put it in quotes")
    return [f"--{name}={value}"]


def _accepts_mapping(field: dataclasses.Field) -> bool:
    return bool(field.metadata.get("metavar") == "JSON")
