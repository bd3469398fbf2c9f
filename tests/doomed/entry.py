"""What the catalogue is made of: entries that `check` must catch, and variants it must not touch.

An entry is a function that spoils a sound `Case` (see case.py). What its user has to read was
written down from what really happens without `check`, before there was one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.doomed.case import Case, Surroundings

Make = Callable[[Case], None]


@dataclass(frozen=True)
class Doomed:
    name: str
    topic: str
    make: Make
    finds: str  # regular expression: where it is and what is wrong
    cure: str  # regular expression: what to do
    would_have: str  # words of what happens without `check`; "..." stands for the case's folder
    verb: str  # what runs into it: train, preprocess, submit, or job (submitted and started)
    seen: bool  # whether that was seen here; otherwise it takes a GPU or a site that we lack
    severities: tuple[str, ...]
    on_cluster: bool  # needs a Slurm to ask
    as_root: bool  # mounts a file system, or gives files away


@dataclass(frozen=True)
class Sound:
    name: str
    make: Make
    on_cluster: bool = False
    on_site: bool = False  # where there are GPUs, or so it seems; takes mounts
    large: bool = False  # too large to be trained here

    @property
    def as_root(self) -> bool:
        return self.on_site


DOOMED: list[Doomed] = []
SOUND: list[Sound] = []


def doomed(
    finds: str,
    cure: str,
    would_have: str,
    verb: str = "train",
    seen: bool = True,
    severities: tuple[str, ...] = ("error",),
    on_cluster: bool = False,
    as_root: bool = False,
) -> Callable[[Make], Make]:
    """Put a function into the catalogue, under its own name and its module's."""

    def add(make: Make) -> Make:
        topic = make.__module__.rpartition("of_")[2].replace("_", " ")
        name = make.__name__.replace("_", " ")
        said = (finds, cure, would_have, verb, seen, severities, on_cluster, as_root)
        DOOMED.append(Doomed(name, topic, make, *said))
        return make

    return add


def sound(
    on_cluster: bool = False, on_site: bool = False, large: bool = False
) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        name = make.__name__.replace("_", " ")
        SOUND.append(Sound(name, make, on_cluster, on_site or on_cluster, large))
        return make

    return add


def built(entry: Doomed | Sound, surroundings: Surroundings, folder: Path) -> Case:
    """The entry's case, as it is to be judged."""
    case = surroundings.case(folder)
    if isinstance(entry, Sound) and entry.on_site:
        case.on_site()
    if entry.on_cluster:
        case.on_cluster()
    entry.make(case)
    return case
