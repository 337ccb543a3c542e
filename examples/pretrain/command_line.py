"""From YAML files and the command line to a configuration, checked as a whole, and back."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from pretrain.config import Config
from pretrain.errors import UserError

# A later layer that gives one of these takes the other back.
_ALTERNATIVES = (("steps", "minutes"), ("data", "dataset"))


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings one over the other, the later ones on top."""
    result: dict[str, Any] = {}
    for layer in layers:
        for one, other in (*_ALTERNATIVES, *(pair[::-1] for pair in _ALTERNATIVES)):
            if layer.get(one) and not layer.get(other):
                result.pop(other, None)
        for key, value in layer.items():
            below = result.get(key)
            result[key] = (
                merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
            )
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"the config {path} must be a mapping of fields, and is {type(content).__name__}")
    return content


def checked(fields: Mapping[str, Any]) -> Config:
    """The configuration of these fields; UserError with a line for each that is wrong."""
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise UserError("\n".join(sentence(problem) for problem in error.errors())) from error


def sentence(problem: Any) -> str:
    name, message = ".".join(map(str, problem["loc"])), problem["msg"]
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] == "extra_forbidden":
        return f"Unknown field: {name} (--help lists all)"
    if problem["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        return f"Invalid {name}: {message}" if name else f"Invalid configuration: {message}"
    return f"Invalid {name}: {problem['input']!r} ({message[0].lower()}{message[1:]})"


class _CommandLine(Config, BaseSettings):
    __doc__ = Config.__doc__
    model_config = SettingsConfigDict(
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )


def parse(argv: Sequence[str], default_configs: Callable[[], Sequence[Path]]) -> tuple[Config, Path | None]:
    """The configuration that a command line means, and the run to resume, if any.

    `default_configs` tells what to read where neither ``--config`` nor ``--resume`` is given.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = files.add_argument_group("where the fields come from")
    group.add_argument(
        "--config",
        action="append",
        type=Path,
        metavar="FILE",
        help="YAML of the fields below; again for more, later ones override earlier ones, options override all "
        "(default: configs/llama_60m.yaml, then configs/pretrain_cpu.yaml or, with a GPU, pretrain_gpu.yaml)",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue the run of this folder, with its own configuration",
    )
    given, _ = files.parse_known_args(argv)
    parser = argparse.ArgumentParser(parents=[files], description=Config.__doc__, allow_abbrev=False)
    try:
        options = CliSettingsSource(
            _CommandLine, cli_parse_args=list(argv), cli_parse_none_str="null", root_parser=parser
        )()
    except SettingsError as error:
        raise UserError(f"{error}: {error.__cause__}") from error
    if given.resume is not None:
        return resumed(given.resume, merged(*map(read_yaml, given.config or ()), options)), given.resume
    configs = given.config or default_configs()
    config = checked(merged(*map(read_yaml, configs), options))
    if config.out is None:
        name = f"{configs[-1].stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        config = config.model_copy(update={"out": Path("runs", name).absolute()})
    return config, None


def resumed(run: Path, asked: Mapping[str, Any]) -> Config:
    """The configuration of the run in a folder, with which the fields `asked` for must agree; else UserError."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"Invalid --resume: {run} holds no run (no {path.name} in it)")
    fields = read_yaml(path)
    stored = checked(fields).model_copy(update={"out": run.absolute()})
    # What was left to the program when the run began has been decided.
    open_ = {"minutes": asked.get("minutes"), "device": "auto", "threads": None}
    asked = {key: value for key, value in asked.items() if key not in open_ or value != open_[key]}
    if asked.get("out") is None:
        asked.pop("out", None)
    now = checked(merged(fields, {"out": str(stored.out)}, asked)).model_dump(mode="json")
    differing = _differences(stored.model_dump(mode="json"), now)
    if differing:
        listed = "; ".join(f"{name} is {was} in {path} and {is_} now" for name, was, is_ in differing)
        raise UserError(f"a run goes on with its own configuration: {listed}")
    return stored


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    result = []
    for key in a:
        if isinstance(a[key], dict) and isinstance(b[key], dict):
            result += _differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            result.append((prefix + key, a[key], b[key]))
    return result


def to_yaml(config: Config) -> str:
    """All fields, so that ``--config`` on it repeats the run."""
    fields = config.model_dump(mode="json", exclude={"out"})
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
