"""Configurations: YAML files laid over each other, ``key.sub=value`` changes on top.

A recipe keeps one base configuration and small overlays (fusion, size) instead of a copy per experiment; the merged
mapping is written to the experiment directory, so that what was run can be read in one file.
"""

import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pam_espnet.errors import ConfigError

LAST_COMMIT = "6d6c31d"  # of version 0.1, which had what version 0.2 removed


def parse_yaml(text: str) -> Any:
    """YAML, with ``1e-4`` read as a number (YAML 1.1 reads it as text) and a key given twice refused.
    Raises yaml.YAMLError: not YAML."""
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader with these two changes; a separate class, so that PyYAML's stays as it is."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                name = (key.tag, str(key.value))
                if name in lines:
                    problem = f"the key {key.value!r} was given in line {lines[name]} already"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                lines[name] = key.start_mark.line + 1
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return yaml.load(text, Loader)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: missing file, broken YAML or a key given twice (with its line), or not a mapping.
        DataError: not UTF-8.
    """
    import yaml

    from pam_espnet.fileio import read_text

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        value = parse_yaml(read_text(path))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must be a mapping of options, got {type(value).__name__}")
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``: mappings merge key by key, other values replace, null removes the key."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def parse_change(text: str) -> dict[str, Any]:
    """``"a.b=3"`` -> ``{"a": {"b": 3}}``; the value is YAML.
    Raises ConfigError: no ``=``, an empty key, or a value that is not YAML."""
    import yaml

    key, found, value = text.partition("=")
    if not found or not all(key.split(".")):
        raise ConfigError(f"a change must look like key.sub=value, got {text!r}")
    try:
        nested: Any = parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r}: the value is not YAML: {error}") from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def resolve(files: Sequence[str | Path], changes: Sequence[str] = ()) -> dict[str, Any]:
    """Merge configuration files from left to right, then the changes."""
    config: dict[str, Any] = {}
    for file in files:
        config = merge(config, load_yaml(file))
    for change in changes:
        config = merge(config, parse_change(change))
    return config


def used_encoders(config: Mapping[str, Any]) -> list[str]:
    """The encoders that the configured fusion uses: all, or the one of ``single``.
    Raises ConfigError: none is configured."""
    frontend = config.get("frontend_conf") or {}
    if not isinstance(frontend, Mapping) or not isinstance(frontend.get("encoders") or {}, Mapping):
        raise ConfigError("frontend_conf and frontend_conf.encoders must be mappings")
    encoders = list(frontend.get("encoders") or {})
    if not encoders:
        raise ConfigError("frontend_conf.encoders: none given")
    if frontend.get("fusion") == "single":
        return [(frontend.get("fusion_conf") or {}).get("encoder", encoders[0])]
    return encoders


def add_specs(config: Mapping[str, Any], cache: str | Path) -> dict[str, Any]:
    """``config`` with the specs in the feature cache (``cache/<encoder>/spec.json``), so that training loads no encoder
    that it does not run."""
    from pam_espnet.fileio import read_json

    found = {name: Path(cache) / name / "spec.json" for name in (config.get("frontend_conf") or {}).get("encoders", {})}
    specs = {name: read_json(path) for name, path in found.items() if path.is_file()}
    return merge(config, {"frontend_conf": {"specs": specs}})


def check_options(options: Mapping[str, Any], key: str, *readers: Callable[..., Any]) -> None:
    """Check that each of ``options`` is a parameter of one of ``readers``.
    Raises ConfigError: unknown options; names the configuration key and what is known."""
    known = {name for reader in readers for name in inspect.signature(reader).parameters}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"config key {key!r}: no option {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def check_number(
    value: Any,
    name: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Raises ConfigError where ``value`` of the option ``name`` is no finite number within the limits."""
    limits = (
        ("at least", at_least, operator.ge),
        ("at most", at_most, operator.le),
        ("above", above, operator.gt),
        ("below", below, operator.lt),
    )
    given = [(word, limit, holds) for word, limit, holds in limits if limit is not None]
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and all(holds(value, limit) for _, limit, holds in given):
        return
    kind = "a whole number" if whole else "a number"
    wanted = " and ".join(f"{word} {limit:g}" for word, limit, _ in given)
    raise ConfigError(f"{name}: {value!r}; must be {kind}" + (f", {wanted}" if wanted else ""))


def drop_removed(options: Mapping[str, Any], removed: Mapping[str, Any], key: str) -> dict[str, Any]:
    """``options`` of an older version without those that are no longer read: ``removed``, those that version 0.1 had
    -> the value at which they changed nothing. ``key``: of ``options`` in the configuration, "" at the top.
    Raises ConfigError: a removed option at another value; names the last commit that had it."""
    for name, neutral in removed.items():
        if name in options and options[name] not in (neutral, None):
            where = f"{key}.{name}" if key else name
            raise ConfigError(
                f"{where}: {options[name]!r} is no longer supported; the last commit that had it is {LAST_COMMIT}\n"
                f"  -> remove the line, or set it to {neutral!r} (CHANGELOG.md says why it was removed)"
            )
    return {name: value for name, value in options.items() if name not in removed}


def write_config(config: Mapping[str, Any], path: str | Path) -> bool:
    """Write ``config`` as YAML, atomically; an equal file is left alone (its time stays). Returns whether it wrote."""
    import yaml

    from pam_espnet.fileio import write_text

    if Path(path).is_file() and load_yaml(path) == dict(config):
        return False
    write_text(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    return True
