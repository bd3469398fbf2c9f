"""The Slurm tests' clusters: each started when a test first asks for it, all ended at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, missing

HERE = Path(__file__).parent
LABS: dict[tuple[bool, bool, int, int], Lab] = {}
LabMaker = Callable[..., Lab]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slurm")


def demand(accounting: bool) -> None:
    """Skip the test where there can be no lab; where there must be one, fail it."""
    reason = missing()
    if reason and os.environ.get("VECTORLM_REQUIRE_SLURM") == "1":
        pytest.fail(reason)
    reason = reason or missing(accounting)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm_lab() -> Iterator[LabMaker]:
    """`slurm_lab(networks=True)`: a cluster of another kind, shared by all who ask for the same."""
    with ExitStack() as stack:

        def lab(
            accounting: bool = False, networks: bool = False, nodes: int = 2, cpus: int = 8
        ) -> Lab:
            kind = (accounting, networks, nodes, cpus)
            if kind not in LABS:
                demand(accounting)
                LABS[kind] = Lab(*kind)
                stack.callback(LABS.pop, kind)
                stack.callback(LABS[kind].close)
            return LABS[kind]

        yield lab


@pytest.fixture(scope="session")
def slurm(slurm_lab: LabMaker) -> Lab:
    """Two nodes, n1 and n2, with 8 CPUs, 8000 MB and 4 (pretended) GPUs each."""
    return slurm_lab()


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    """No test leaves jobs or crashed nodes to the next; jobs of wider fixtures run on."""
    before = {kind: lab.queue() for kind, lab in LABS.items()}
    yield
    for kind, lab in LABS.items():
        lab.tidy(keep=before.get(kind, set()))
