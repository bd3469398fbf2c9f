"""Every doomed entry is caught by `vectorlm check` with its cure, every sound variant passes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doomed.asked import Found
from tests.doomed.case import ROOT, Case, Surroundings
from tests.doomed.catalogue import DOOMED, SOUND, table
from tests.doomed.entry import Doomed, Sound, built
from tests.doomed.judge import catches, findings
from tests.slurm.lab import Lab

LEAST_DOOMED, LEAST_SOUND = 60, 20


def parameters(entries: Sequence[Doomed | Sound]) -> list[object]:
    """Those that ask Slurm last, so that it is started once, and late."""
    return [
        pytest.param(entry, id=entry.name, marks=[pytest.mark.slurm] if entry.on_cluster else [])
        for entry in sorted(entries, key=lambda entry: entry.on_cluster)
    ]


@pytest.fixture
def entry(request: pytest.FixtureRequest) -> Doomed | Sound:
    found: Doomed | Sound = request.param
    if found.on_cluster:
        request.getfixturevalue("cluster")
    if found.as_root and os.geteuid() != 0:
        pytest.skip("mounts a file system of its own, which only root may")
    return found


@pytest.fixture(autouse=True)
def _small(folder: Path) -> Iterator[None]:
    """Folders of hard links by the hundred need not stay."""
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("entry", parameters(DOOMED), indirect=True)
def test_doomed(entry: Doomed, surroundings: Surroundings, folder: Path) -> None:
    found = findings(built(entry, surroundings, folder))
    shown = "\n".join(map(str, found)) or "nothing"
    assert catches(entry, found), f"wanted {entry.finds!r}, cure {entry.cure!r}; found:\n{shown}"


@pytest.mark.parametrize("entry", parameters(SOUND), indirect=True)
def test_sound(entry: Sound, surroundings: Surroundings, folder: Path) -> None:
    found = findings(built(entry, surroundings, folder))
    loud = [one for one in found if one.severity != "note"]
    assert not loud, "\n".join(map(str, loud))


@pytest.mark.slurm
def test_nodes_that_are_away_are_no_error(
    cluster: Lab, surroundings: Surroundings, folder: Path
) -> None:
    """A job may well be submitted in a night of maintenance: Slurm takes it, and it waits."""

    def job(case: Case) -> None:
        case.slurm(gpus_per_node=4, time="00:10:00")

    variant = Sound("a job for later", job, on_cluster=True, on_site=True)
    nodes = ("scontrol", "update", "NodeName=n[1-2]")
    cluster.run(*nodes, "State=DRAIN", "Reason=maintenance")
    try:
        found = findings(built(variant, surroundings, folder))
    finally:
        cluster.run(*nodes, "State=RESUME")
        cluster.until(lambda: "idle" in cluster.node_state("n1"), "n1 back", 20)
    told = "\n".join(map(str, found))
    assert {one.severity for one in found} - {"note"} == {"warning"}, told


def test_the_catalogue_is_large() -> None:
    for entries, least in ((DOOMED, LEAST_DOOMED), (SOUND, LEAST_SOUND)):
        names = [entry.name for entry in entries]
        assert len(names) == len(set(names)) >= least
    assert all(entry.would_have for entry in DOOMED)


def test_the_documentation_has_the_table() -> None:
    """`python -m tests.doomed --table` prints it anew."""
    assert table() in (ROOT / "docs/check.md").read_text(encoding="utf-8")


def test_a_miss_is_a_miss() -> None:
    """Guards the judge: words of the one are not enough without those of the other."""
    entry = replace(DOOMED[0], finds="one", cure="two", severities=("error",))
    told = Found("error", "model", "has one", "take two")
    assert catches(entry, [told])
    for wrong in (
        replace(told, text="has 1"),
        replace(told, cure="take three"),
        replace(told, severity="warning"),
    ):
        assert not catches(entry, [wrong])
