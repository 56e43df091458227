"""Settings from a file, and the resolved ones as an ``ml_collections.ConfigDict``.

A setting has the name of its flag with underscores. A file's settings are put before the words of the command line, so
that the same parser checks both and the command line wins. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.run.errors import UsageError

DEEPEST = 2
"""Groups of settings within groups."""
NEEDED = "the package ml_collections is missing: pip install 'leanvit[papers]', or give the settings in JSON"


def with_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words of a command line, those that stand for the settings of its ``--config`` before them.

    Raises:
        UsageError: the file cannot be read, or sets what is no flag.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(words)[0].config
    if not file:
        return list(words)
    known = _settings(parser)
    found: list[str] = []
    for name, value in _leaves(_read(Path(file)), file):
        if name not in known:
            raise UsageError(f"--config {file}: there is no flag --{name}; see --help for those there are")
        found += _words(known[name], value)
    return [*found, *words]


def config_text(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The resolved settings as ``print`` shows a ConfigDict: YAML.

    Raises:
        UsageError: ml_collections is missing.
    """
    try:
        from ml_collections import ConfigDict
    except ModuleNotFoundError as error:
        raise UsageError(f"--print_config: {NEEDED}") from error
    return str(ConfigDict({name: getattr(args, name) for name in _settings(parser)})).rstrip()


def _settings(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Name -> flag that a file may set; of several that set the same, the first."""
    left_out = ("help", "config", "print_config", argparse.SUPPRESS)
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.option_strings and action.dest not in left_out:
            found.setdefault(action.dest, action)
    return found


def _words(action: argparse.Action, value: Any) -> list[str]:
    """What one would type for a value."""
    flag = action.option_strings[0]
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if value else action.option_strings[-1]]
    if action.nargs == 0:
        return [flag] if value else []
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, (list, tuple, Mapping)) for item in value):
            raise UsageError(f"--config: {flag} takes values, and none that hold others")
        return [flag, *map(str, value)] if action.nargs else [f"{flag}={','.join(map(str, value))}"]
    return [f"{flag}={int(value) if isinstance(value, bool) else value}"]


def _leaves(content: Any, file: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Names and values, those of nested groups, too."""
    if depth > DEEPEST:  # YAML's aliases can make any number of groups of a few lines
        raise UsageError(f"--config {file}: groups are nested deeper than {DEEPEST}")
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {file}: it holds a {type(content).__name__}, expected settings by name")
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, file, depth + 1)
        else:
            yield str(name).replace("-", "_"), value


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    try:
        if path.suffix == ".py":
            content = runpy.run_path(str(path))["get_config"]()
            return content.to_dict() if hasattr(content, "to_dict") else content
        return json.loads(path.read_text()) if path.suffix == ".json" else _read_yaml(path.read_text())
    except ModuleNotFoundError as error:
        missing = error.name == "ml_collections"
        raise UsageError(f"--config {path}: {NEEDED if missing else error}") from error
    except Exception as error:  # whatever the file does
        raise UsageError(f"--config {path}: {type(error).__name__}: {error}") from error


def _read_yaml(text: str) -> Any:
    """YAML without code; the two tags that a ConfigDict writes are understood."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def config(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Any:
        return loader.construct_mapping(node, deep=True)["_fields"]

    def values(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> Any:
        return loader.construct_sequence(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:python/object:ml_collections.config_dict.config_dict.ConfigDict", config)
    Loader.add_constructor("tag:yaml.org,2002:python/tuple", values)
    return yaml.load(text, Loader)
