"""What crosses the link between two nodes in a step is what the way of sharding promises: counted
while the real trainer runs. Rates are the matter of benchmarks/slow_link.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.slow_link import (
    MAX_DEVIATION,
    RANKS,
    START_S,
    UNLIMITED,
    Job,
    Model,
    Setting,
    make_config,
    make_model,
    make_rows,
    step_bytes,
)
from tests.slurm.conftest import LabMaker

# Three micro-batches of rows: in each epoch a step of two, and a step of the one that is left.
ACCUMULATION, ROWS, EPOCHS = 2, 3 * RANKS, 5
COUNTED = {2: (5, 7), 1: (6, 8)}  # micro-batches -> their steps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of 6 MB: a step takes long enough for its end to be seen in time."""
    folder = tmp_path_factory.mktemp("slow-link") / "model"
    return make_model(folder, intermediate_size=256, num_hidden_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "HYBRID_SHARD"])
def test_bytes_across_the_link(
    slurm_lab: LabMaker, model: Model, tmp_path: Path, strategy: str
) -> None:
    lab = slurm_lab(networks=True)
    lab.limit(UNLIMITED)
    data = make_rows(tmp_path / "data", model, ROWS)
    config = make_config(tmp_path / "run", model, data, Setting(strategy, ACCUMULATION), EPOCHS)
    job = Job(lab, tmp_path / "run", config)
    job.end_of(1, START_S)
    lab.limit("400mbit")  # TCP needs some steps to take it in, and sends what is late twice
    ends = {step: job.end_of(step) for step in range(4, 9)}
    assert all(end.step == step for step, end in ends.items()), "the end of a step was missed"
    lab.limit(UNLIMITED)
    for micro_batches, steps in COUNTED.items():
        counted = sum(ends[n].received - ends[n - 1].received for n in steps) / len(steps)
        theory = step_bytes(model, strategy, micro_batches)
        assert counted == pytest.approx(theory, rel=MAX_DEVIATION)
    assert lab.wait(job.id) == "COMPLETED", lab.account(job.id)
