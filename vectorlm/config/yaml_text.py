"""YAML text -> plain values, with the line of every key and every fault at once. Floor 0.

PyYAML's own safe loader is too quiet for a file that decides over days of computing: it keeps the
last of two equal keys, reads `2e-5` as a text, `010` as eight and `1:30` as ninety. So its parser
is used here, its resolver and constructor are not. Called by `load`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

PREFIX = "tag:yaml.org,2002:"
MERGE = PREFIX + "merge"
MOST_VALUES = 50_000
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

Path = tuple[str, ...]
Pair = tuple[yaml.Node, yaml.Node]


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with our own idea of what a plain scalar is."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


def _plain(kind: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(PREFIX + kind, re.compile(rf"(?:{pattern})\Z"), [*first])


_plain("bool", "[Tt]rue|TRUE|[Ff]alse|FALSE|[Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF", "tTfFyYnNoO")
_plain("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)", "-+0123456789")
_plain(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+0123456789.",
)
_plain("null", "~|null|Null|NULL", "~nN")
_Loader.add_implicit_resolver(PREFIX + "null", re.compile(r"\Z"), [""])
_plain("merge", "<<", "<")


class YamlError(Exception):
    """The text is not YAML; carries the line and what is wrong."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Refused(Exception):
    """One value that cannot be taken; the key that holds it is left out."""


@dataclass(frozen=True)
class Fault:
    line: int
    path: Path
    message: str


@dataclass
class Document:
    """The values, the line of each key, and what is wrong with the text itself."""

    value: Any = None
    line: int = 1
    lines: dict[Path, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def read_yaml(text: str) -> Document:
    """Parse one YAML document; YamlError when it is none."""
    root = _compose(text)
    if root is None:
        return Document()
    builder = _Builder(Document(line=root.start_mark.line + 1))
    try:
        builder.document.value = builder.value(root, ())
    except _Refused as error:
        builder.fault(root, (), str(error))
    except RecursionError:
        raise YamlError(1, "is nested too deeply") from None
    return builder.document


def number(text: str) -> int | float | None:
    """What a plain scalar with this text would be, where that is a finite number."""
    try:
        value = read_yaml(text).value
    except YamlError:
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _compose(text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parts = [part for part in (error.context, error.problem) if part]
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise YamlError(
            mark.line + 1 if mark else 1, f"is not YAML: {', '.join(parts)}{hint}"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            line, f"holds a character that YAML does not allow (U+{_code(error):04X})"
        ) from None
    except RecursionError:
        raise YamlError(1, "is nested too deeply") from None


def _code(error: yaml.reader.ReaderError) -> int:
    return error.character if isinstance(error.character, int) else ord(str(error.character))


class _Builder:
    """Walks the nodes; remembers which are open, to refuse values that contain themselves."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.open: set[int] = set()
        self.count = 0

    def fault(self, node: yaml.Node, path: Path, message: str) -> None:
        self.document.faults.append(Fault(node.start_mark.line + 1, path, message))

    def spend(self) -> None:
        self.count += 1
        if self.count > MOST_VALUES:
            raise _Refused(f"grows to more than {MOST_VALUES} values through its aliases")

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.spend()
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        _plain_collection(node)
        if id(node) in self.open:
            raise _Refused("contains itself through an alias")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, path) for item in node.value]
            return self.mapping(list(node.value), path)
        finally:
            self.open.discard(id(node))

    def mapping(self, pairs: list[Pair], path: Path) -> dict[str, Any]:
        groups: dict[str, list[Pair]] = {}
        for key, node in pairs:
            if key.tag == MERGE:
                continue
            name = self.name(key, path)
            if name is not None:
                groups.setdefault(name, []).append((key, node))
        for name, pair in self.merged(pairs, path):
            groups.setdefault(name, [pair])
        return {
            name: value for name, group in groups.items() for value in self.entry(name, group, path)
        }

    def entry(self, name: str, group: list[Pair], path: Path) -> Iterator[Any]:
        """The value of one key, or nothing where it was refused."""
        here = (*path, name)
        key, node = group[-1]
        first = group[0][0].start_mark.line + 1
        self.document.lines[here] = key.start_mark.line + 1
        for again, _ in group[1:]:
            self.fault(again, here, f"given twice; the other is on line {first}; keep one")
        try:
            if len(group) > 1 and all(isinstance(value, yaml.MappingNode) for _, value in group):
                # A section in two places: read both, so that no mistake in either stays hidden.
                yield self.mapping([pair for _, value in group for pair in value.value], here)
            else:
                yield self.value(node, here)
        except _Refused as error:
            self.fault(key, here, str(error))

    def name(self, key: yaml.Node, path: Path) -> str | None:
        if isinstance(key, yaml.ScalarNode) and key.tag == PREFIX + "str":
            return str(key.value)
        shown = f"key {key.value!r}" if isinstance(key, yaml.ScalarNode) else "a key"
        self.fault(
            key, path, f"{shown} is not a text for YAML; must be a text; put the key in quotes"
        )
        return None

    def merged(self, pairs: list[Pair], path: Path) -> Iterator[tuple[str, Pair]]:
        """What `<<` brings in; the first wins, and a key of the mapping itself over all."""
        merges = [pair for pair in pairs if pair[0].tag == MERGE]
        for key, _ in merges[1:]:
            self.fault(
                key,
                path,
                f"<< is given twice; the other is on line {merges[0][0].start_mark.line + 1}",
            )
        for key, node in merges:
            sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
            for source in sources:
                if not isinstance(source, yaml.MappingNode) or id(source) in self.open:
                    self.fault(key, path, "<< must name one or several mappings, and not itself")
                    continue
                yield from self.pairs_of(source, path)

    def pairs_of(self, source: yaml.MappingNode, path: Path) -> Iterator[tuple[str, Pair]]:
        self.open.add(id(source))
        for key, node in source.value:
            self.spend()
            name = self.name(key, path) if key.tag != MERGE else None
            if name is not None:
                yield name, (key, node)
        yield from self.merged(list(source.value), path)
        self.open.discard(id(source))


def _plain_collection(node: yaml.Node) -> None:
    if node.tag not in (PREFIX + "map", PREFIX + "seq"):
        raise _Refused(
            f"has the tag {_short(node.tag)}, which is refused; must be plain YAML; remove the tag"
        )


def _scalar(node: yaml.ScalarNode) -> Any:
    text = str(node.value)
    kind = node.tag.removeprefix(PREFIX)
    if node.tag == MERGE or kind == "str":
        return text
    if kind == "null" and text.lower() in ("", "~", "null"):
        return None
    if kind == "bool" and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if kind in ("int", "float"):
        return _number(kind, text)
    raise _Refused(
        f"has the tag {_short(node.tag)}, which is refused; must be plain YAML; remove the tag"
    )


def _number(kind: str, text: str) -> int | float:
    try:
        value = int(text, 0) if kind == "int" else float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError:
        raise _Refused(f"is {text[:40]!r}, which cannot be read as a number") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise _Refused(
            f"is {text[:40]}; must be a finite number; put it in quotes if a text is meant"
        )
    return value


def _short(tag: str) -> str:
    return "!!" + tag.removeprefix(PREFIX) if tag.startswith(PREFIX) else tag
