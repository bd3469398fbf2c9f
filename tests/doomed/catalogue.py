"""All entries and variants, in the order in which they are told."""

from __future__ import annotations

from tests.doomed import (
    of_chat,
    of_configuration,
    of_data,
    of_machine,
    of_memory_and_time,
    of_model,
    of_output,
    of_slurm,
    sound,
)
from tests.doomed.entry import DOOMED, SOUND, Doomed

__all__ = ["DOOMED", "SOUND", "VARIANTS", "table"]
TOPICS = (
    of_configuration,
    of_model,
    of_data,
    of_chat,
    of_output,
    of_machine,
    of_slurm,
    of_memory_and_time,
)
VARIANTS = sound  # to import a module is to put what is in it into the catalogue


def table() -> str:
    """Every entry with what happens without `check`, topic by topic."""
    lines: list[str] = []
    for module in TOPICS:
        entries = [entry for entry in DOOMED if entry.make.__module__ == module.__name__]
        title = entries[0].topic.capitalize()
        lines += ["", f"### {title}", "", "| | without `check` | seen |", "|---|---|---|"]
        lines += [
            f"| {entry.name} | {without_check(entry)} | {'yes' if entry.seen else 'no'} |"
            for entry in entries
        ]
    return "\n".join(lines[1:])


def without_check(entry: Doomed) -> str:
    remark = " ".join((entry.make.__doc__ or "").split())
    said = f"{entry.verb}: {entry.would_have}"
    return f"{said}. {remark}".removesuffix(".") if remark else said
