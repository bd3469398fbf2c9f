"""The schema as a flat table of keys, for messages and reference pages. Floor 0.

`load` asks it what a key may hold and where an unknown key may belong; `reference` prints all of
it. Everything is read from the JSON schema that pydantic derives: `config.schema` stays the only
source.
"""

from __future__ import annotations

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
    TrainParameters,
)

Kind = Literal["section", "mapping", "choice", "text", "integer", "number", "boolean", "pair"]
KeyPath = tuple[str, ...]

# Values that files of the original hold; accepted, but never recommended.
MISSPELT = {"plataeu-with-warmup": "plateau-with-warmup"}

SECTIONS: dict[KeyPath, type[Section]] = {
    (): Config,
    ("train_parameters",): TrainParameters,
    ("train_parameters", "optimizer"): Optimizer,
    ("dataset",): DatasetConfig,
    ("dataset_preprocess",): DatasetPreprocess,
}


@dataclass(frozen=True)
class Key:
    """One YAML key: where it stands, how it may be spelt, what it may hold."""

    path: KeyPath
    spellings: tuple[str, ...]
    kind: Kind
    choices: tuple[str, ...]
    range: str
    nullable: bool
    required: bool
    default: Any
    description: str
    placeholder: Any

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def allowed(self) -> str:
        """What the key may hold, in words that follow `must be`."""
        words = {
            "section": "a section, with its keys indented below it",
            "mapping": "a mapping, with its keys indented below it",
            "choice": "one of " + ", ".join(one for one in self.choices if one not in MISSPELT),
            "text": "a non-empty text" if self.range else "a text",
            "integer": "a whole number" + self.range,
            "number": "a number" + self.range,
            "boolean": "true or false",
            "pair": "a list of 2 numbers" + self.range,
        }[self.kind]
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
    value = next(branch for branch in branches if branch.get("type") != "null")
    kind = _kind(path, value)
    alias = model.model_fields[path[-1]].validation_alias
    extra = alias.choices if isinstance(alias, AliasChoices) else []
    return Key(
        path=path,
        spellings=(path[-1], *(str(name) for name in extra if name != path[-1])),
        kind=kind,
        choices=tuple(map(str, value.get("enum", ()))),
        range=_range(value["prefixItems"][0], ", each") if kind == "pair" else _range(value),
        nullable=len(branches) > 1,
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
    kinds: dict[str, Kind] = {
        "string": "text",
        "integer": "integer",
        "number": "number",
        "boolean": "boolean",
        "object": "mapping",
        "array": "pair",
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
