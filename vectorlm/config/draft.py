"""Values on their way to a Config, where each came from, the problems found so far. Floor 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vectorlm.config.keys import KeyPath, canonical, dotted, find
from vectorlm.config.suggest import shown


@dataclass(frozen=True)
class Origin:
    """Where a key was given: the order of its problems (the file's lines, then `--set`, then the
    points of a sweep), and how their line begins."""

    order: tuple[int, int]
    label: str

    @property
    def line(self) -> int:
        """The line in the file; 0 for `--set`."""
        return 0 if self.order[0] == 1 else self.order[1]

    @property
    def words(self) -> str:
        return f"on line {self.line}" if self.line else "given by --set"


@dataclass
class Draft:
    values: dict[str, Any]
    origins: dict[KeyPath, Origin]
    problems: list[tuple[tuple[int, int], str]] = field(default_factory=list)
    doubtful: set[KeyPath] = field(default_factory=set)

    def report(self, path: KeyPath, message: str, origin: Origin | None = None) -> None:
        """Note a problem; nothing further is concluded from the key that has it."""
        where = origin or self.origin(path)
        name = f"{dotted(path)}: " if path else ""
        self.problems.append((where.order, f"{where.label}{name}{message}"))
        self.doubtful.add(canonical(path))

    def path_of(self, name: str) -> KeyPath:
        """The path of a dotted name; keys of a sweep's grid have dots of their own."""
        return next((path for path in self.origins if dotted(path) == name), tuple(name.split(".")))

    def sorted_problems(self) -> list[str]:
        return list(
            dict.fromkeys(text for _, text in sorted(self.problems, key=lambda entry: entry[0]))
        )

    def in_doubt(self, path: KeyPath) -> bool:
        """Is this key, a section it stands in, or a value inside it among the wrong ones?"""
        return any(
            path[: len(bad)] == bad or bad[: len(path)] == path for bad in self.doubtful if bad
        )

    def origin(self, path: KeyPath) -> Origin:
        """Of the key itself, or of the nearest section around it."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def get(self, path: KeyPath) -> Any:
        value: Any = self.values
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        value = self.get(path)
        return value if isinstance(value, dict) else {}

    def holds(self, path: KeyPath) -> bool:
        """Is there a mapping at this path?"""
        return isinstance(self.get(path), dict)

    def has(self, path: KeyPath) -> bool:
        return path[-1] in self.mapping(path[:-1])

    def as_spelt(self, path: KeyPath) -> KeyPath:
        """The path with the spelling that was used."""
        key = find(path)
        spellings = [(*path[:-1], word) for word in key.spellings] if key else []
        return next((one for one in spellings if self.has(one)), path)

    def put(self, path: KeyPath, value: Any, origin: Origin) -> str | None:
        """Set a key, making its sections; returns why that cannot be."""
        for end in range(1, len(path)):
            around = path[:end]
            if self.get(around) is None:
                self.mapping(around[:-1])[around[-1]] = {}
                self.origins.setdefault(around, origin)
            elif not isinstance(self.get(around), dict):
                return f"cannot be set, because {dotted(around)} is {shown(self.get(around))}"
        key = find(path)
        for word in key.spellings if key else ():
            self.drop((*path[:-1], word))
        self.drop(path)
        self.mapping(path[:-1])[path[-1]] = value
        self.origins[path] = origin
        return None

    def drop(self, path: KeyPath) -> None:
        self.mapping(path[:-1]).pop(path[-1], None)
        for known in [one for one in self.origins if one[: len(path)] == path]:
            del self.origins[known]

    def move(self, old: KeyPath, new: KeyPath) -> None:
        """To where it belongs, with the lines of everything inside."""
        value = self.mapping(old[:-1]).pop(old[-1])
        self.mapping(new[:-1])[new[-1]] = value
        for known in [one for one in self.origins if one[: len(old)] == old]:
            self.origins[new + known[len(old) :]] = self.origins.pop(known)
