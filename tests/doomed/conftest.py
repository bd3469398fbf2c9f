"""The surroundings and the cluster of the catalogue, each built once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doomed.case import Surroundings
from tests.doomed.cluster import large_lab
from tests.slurm.lab import Lab, missing


@pytest.fixture(scope="session")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    made = Surroundings(tmp_path_factory.mktemp("doomed"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def cluster(surroundings: Surroundings) -> Iterator[Lab]:
    """Puts a Slurm into the surroundings; skips where there can be none."""
    reason = missing(accounting=True)
    if reason and os.environ.get("VECTORLM_REQUIRE_SLURM") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with large_lab() as lab:
        surroundings.lab = lab
        yield lab
        surroundings.lab = None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "case"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    scores = []
    for name, verb in (("doomed", "caught"), ("sound", "silent")):
        here = f"doomed/test_doomed.py::test_{name}["
        passed, failed = (
            sum(here in report.nodeid for report in terminalreporter.getreports(outcome))
            for outcome in ("passed", "failed")
        )
        if passed + failed:
            scores.append(f"{name}: {passed} of {passed + failed} {verb}")
    if scores:
        terminalreporter.write_line("; ".join(scores))
