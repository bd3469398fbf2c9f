"""A configuration, written down as it is: what is edited later does not change a job that waits.
Floor 1, used by `submit`.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.config.yaml_text import YamlError, read_yaml


def freeze(config: Config, path: Path, origin: str) -> None:
    """What was given, and what `load_config` makes the same of again."""
    values = config.model_dump(mode="json", exclude_unset=True)
    if config.sweep is None:
        values.pop("sweep", None)
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    write_private(path, origin + text)
    assert load_config(path) == config


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our own reader would take for something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if _reads_as_itself(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _reads_as_itself(text: str) -> bool:
    try:
        return bool(read_yaml(text).value == text)
    except YamlError:
        return False


_Dumper.add_representer(str, _represent_text)


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, readable by its owner alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(os.fsencode(text))
    os.replace(temporary, path)
