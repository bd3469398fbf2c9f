"""`python -m tests.doomed`: the catalogue, judged, as the table of docs/check.md.

    python -m tests.doomed [WORDS]           what `check` finds, entry by entry
    python -m tests.doomed --live [WORDS]    what happens without it, on this machine (minutes)
    python -m tests.doomed --table           only the table

WORDS choose the entries whose name or topic holds one of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TypeVar

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
os.environ.update(dict.fromkeys(OFFLINE, "1"))  # before anything imports their libraries
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from tests.doomed import judge, live  # noqa: E402
from tests.doomed.case import Case, Surroundings  # noqa: E402
from tests.doomed.catalogue import DOOMED, SOUND, table  # noqa: E402
from tests.doomed.cluster import large_lab  # noqa: E402
from tests.doomed.entry import Doomed, Sound, built  # noqa: E402
from tests.slurm.lab import missing  # noqa: E402

Entry = TypeVar("Entry", Doomed, Sound)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.doomed", description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="doomed-")))
        with redirect_stdout(sys.stderr):
            surroundings = Surroundings(folder / "first")
        stack.callback(surroundings.close)
        doomed, sound = chosen(DOOMED, arguments.words), chosen(SOUND, arguments.words)
        ask_slurm = any(one.on_cluster for one in doomed) or any(one.on_cluster for one in sound)
        if ask_slurm and not missing(accounting=True):
            surroundings.lab = stack.enter_context(large_lab())
        desk = Desk(surroundings, folder)
        if arguments.live:
            return desk.live(doomed, sound)
        return desk.check(doomed, sound)


def chosen(entries: Sequence[Entry], words: Sequence[str]) -> list[Entry]:
    texts = [f"{entry.name} {getattr(entry, 'topic', 'sound')}" for entry in entries]
    pairs = zip(entries, texts, strict=True)
    return [entry for entry, text in pairs if not words or any(word in text for word in words)]


class Desk:
    """Judges entries one by one, each in a folder that is removed again."""

    def __init__(self, surroundings: Surroundings, folder: Path) -> None:
        self.surroundings, self.folder = surroundings, folder / "case"
        self.counts: Counter[str] = Counter()

    def case(self, entry: Doomed | Sound, look: Callable[[Case], str | None]) -> None:
        """Print what `look` has against the entry, if anything."""
        kind = "doomed" if isinstance(entry, Doomed) else "sound"
        if entry.on_cluster and self.surroundings.lab is None:
            print(f"skipped: {entry.name}: needs a Slurm")
            return
        self.counts[kind] += 1
        try:
            with redirect_stdout(sys.stderr):
                said = look(built(entry, self.surroundings, self.folder))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        if said is None:
            self.counts[f"{kind} well"] += 1
        else:
            print(f"---- {kind}: {entry.name}\n{said}", flush=True)

    def check(self, doomed: Sequence[Doomed], sound: Sequence[Sound]) -> int:
        for entry in doomed:
            self.case(entry, lambda case, entry=entry: missed(entry, case))
        for variant in sound:
            self.case(variant, alarms)
        return self.score("caught", "silent")

    def live(self, doomed: Sequence[Doomed], sound: Sequence[Sound]) -> int:
        for entry in doomed:
            if entry.seen:
                self.case(entry, lambda case, entry=entry: otherwise(entry, case))
        for variant in sound:
            if not variant.on_cluster and not variant.large:
                self.case(variant, fails)
        return self.score("as written", "trained")

    def score(self, caught: str, silent: str) -> int:
        count = self.counts
        print(
            f"doomed: {count['doomed well']} of {count['doomed']} {caught}; "
            f"sound: {count['sound well']} of {count['sound']} {silent}"
        )
        kinds = ("doomed", "sound")
        return 0 if all(count[kind] == count[f"{kind} well"] for kind in kinds) else 1


def missed(entry: Doomed, case: Case) -> str | None:
    found = judge.findings(case)
    if judge.catches(entry, found):
        return None
    shown = "\n".join(map(str, found)) or "nothing"
    return f"  wanted {entry.severities} /{entry.finds}/ cure /{entry.cure}/; found\n{shown}"


def alarms(case: Case) -> str | None:
    loud = [found for found in judge.findings(case) if found.severity != "note"]
    return "\n".join(map(str, loud)) or None


def otherwise(entry: Doomed, case: Case) -> str | None:
    happened = live.happens(case, entry.verb)
    return None if entry.would_have in happened else f"wanted {entry.would_have!r}\n{happened}"


def fails(case: Case) -> str | None:
    happened = live.happens(case, "train" if "dataset" in case.config else "preprocess")
    return None if happened.startswith("exit 0\n") else happened


if __name__ == "__main__":
    sys.exit(main())
