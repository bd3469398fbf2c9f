"""The schema as a flat table of keys, for messages and reference pages. Floor 0.

`load` asks it what a key may hold and where an unknown key may belong; `reference` prints all of
it. Everything is read from the JSON schema that pydantic derives: `config.schema` stays the only
source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import AliasChoices

from vectorlm.config.schema import (
    Config,
    DatasetConfig,
    DatasetPreprocess,
    Optimizer,
    Section,
    Slurm,
    SlurmPreprocess,
    Sweep,
    TrainParameters,
)

Kind = Literal[
    "section",
    "mapping",
    "choice",
    "text",
    "integer",
    "number",
    "boolean",
    "pair",
    "texts",
    "mappings",
]
KeyPath = tuple[str, ...]

# Values that files of the original hold; accepted, but never recommended.
MISSPELT = {"plataeu-with-warmup": "plateau-with-warmup"}

SECTIONS: dict[KeyPath, type[Section]] = {
    (): Config,
    ("train_parameters",): TrainParameters,
    ("train_parameters", "optimizer"): Optimizer,
    ("dataset",): DatasetConfig,
    ("dataset_preprocess",): DatasetPreprocess,
    ("slurm",): Slurm,
    ("slurm", "preprocess"): SlurmPreprocess,
    ("sweep",): Sweep,
}


@dataclass(frozen=True)
class Key:
    """One YAML key: where it stands, how it may be spelt, what it may hold."""

    path: KeyPath
    spellings: tuple[str, ...]
    kind: Kind
    choices: tuple[str, ...]
    range: str
    pattern: str
    words: str  # the schema's own, where it has any, for `allowed`
    nullable: bool
    required: bool
    default: Any
    description: str
    placeholder: Any

    @property
    def name(self) -> str:
        return self.path[-1]

    def takes(self, text: str) -> bool:
        """Does the pattern that the key or its items may have admit this text as it stands?"""
        return bool(self.pattern) and re.fullmatch(self.pattern, text) is not None

    @property
    def allowed(self) -> str:
        """What the key may hold, in words that follow `must be`."""
        usual = {
            "section": "a section, with its keys indented below it",
            "mapping": "a mapping, with its keys indented below it",
            "choice": "one of " + ", ".join(one for one in self.choices if one not in MISSPELT),
            "text": "a non-empty text" if self.range else "a text",
            "integer": "a whole number" + self.range,
            "number": "a number" + self.range,
            "boolean": "true or false",
            "pair": "a list of 2 numbers" + self.range,
            "texts": "a list of texts",
            "mappings": "a list of mappings",
        }[self.kind]
        words = self.words or usual
        comma = "," if "," in words else ""
        return words + (f"{comma} or null" if self.nullable and self.kind != "section" else "")


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


@cache
def all_keys() -> dict[KeyPath, Key]:
    """Every key under its right spelling, in the order of the schema."""
    document = Config.model_json_schema()
    found: dict[KeyPath, Key] = {}
    for prefix, model in SECTIONS.items():
        title = model.__name__
        node = document if model is Config else document["$defs"][title]
        for name, entry in node["properties"].items():
            path = (*prefix, name)
            found[path] = _key(path, model, entry, name in node.get("required", ()))
    return found


@cache
def keys_of(section: KeyPath) -> dict[str, Key]:
    """The keys of one section under every accepted spelling."""
    members = [key for path, key in all_keys().items() if path[:-1] == section]
    return {spelling: key for key in members for spelling in key.spellings}


def find(path: KeyPath) -> Key | None:
    """The key at a path, whatever its spelling."""
    if not path or path[:-1] not in SECTIONS:
        return None
    return keys_of(path[:-1]).get(path[-1])


def canonical(path: KeyPath) -> KeyPath:
    """The path under its right spelling; paths inside free mappings stay as they are."""
    key = find(path)
    return key.path if key else path


def _key(path: KeyPath, model: type[Section], entry: dict[str, Any], required: bool) -> Key:
    branches = entry.get("anyOf", [entry])
    values = [branch for branch in branches if branch.get("type") != "null"]
    # A text may also be given as a whole number, where that is how YAML reads it (`time: 90`).
    value = next((branch for branch in values if "pattern" in branch), values[0])
    kind = _kind(path, value)
    alias = model.model_fields[path[-1]].validation_alias
    extra = alias.choices if isinstance(alias, AliasChoices) else []
    return Key(
        path=path,
        spellings=(path[-1], *(str(name) for name in extra if name != path[-1])),
        kind=kind,
        choices=tuple(map(str, value.get("enum", ()))),
        range=_range(value["prefixItems"][0], ", each") if kind == "pair" else _range(value),
        pattern=value.get("items", value).get("pattern", ""),
        words=entry.get("allowed", ""),
        nullable=len(values) < len(branches),
        required=required,
        default=entry.get("default"),
        description=entry.get("description", ""),
        placeholder=_placeholder(kind, value) if required else None,
    )


def _kind(path: KeyPath, value: dict[str, Any]) -> Kind:
    if path in SECTIONS:
        return "section"
    if "enum" in value:
        return "choice"
    if value["type"] == "array":
        items = value.get("items", {}).get("type")
        return "texts" if items == "string" else "mappings" if items == "object" else "pair"
    kinds: dict[str, Kind] = {
        "string": "text",
        "integer": "integer",
        "number": "number",
        "boolean": "boolean",
        "object": "mapping",
    }
    return kinds[value["type"]]


def _range(value: dict[str, Any], lead: str = ",") -> str:
    if value.get("minLength"):
        return "non-empty"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{words[name]} {value[name]:g}" for name in words if name in value]
    if value.get("exclusiveMaximum") == 2**31:
        limits[-1] = "below 2^31"
    return f"{lead} " + " and ".join(limits) if limits else ""


def _placeholder(kind: Kind, value: dict[str, Any]) -> Any:
    """Stands in for a missing required key, so that the rules about others can still be checked."""
    if kind == "section":
        return {}
    return value.get("minimum", 1) if kind in ("integer", "number") else "?"
