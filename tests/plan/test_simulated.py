"""A simulation in a process of its own: what goes there, what comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.planner_grid import write_model
from vectorlm.config.schema import Config, Optimizer, TrainParameters
from vectorlm.errors import ModelError
from vectorlm.plan import simulated
from vectorlm.plan.simulated import Job, job_from_json, job_to_json, simulate_apart


def job(model: Path | str, **train: object) -> Job:
    settings = {"output_dir": "out", "max_seq_len": 16, **train}
    return Job(
        Config(model=str(model), train_parameters=TrainParameters.model_validate(settings)), 4, 2
    )


def test_a_job_arrives_as_it_was_sent() -> None:
    sent = job("folder", optimizer=Optimizer(name="SGD", lr=0.1))
    arrived = job_from_json(job_to_json(sent))
    assert arrived == sent
    # SGD refuses `betas` only when the user wrote them.
    given = arrived.config.train_parameters.optimizer.model_fields_set
    assert given == {"name", "lr"}
    assert job_from_json(job_to_json(Job(sent.config, 1, 1, None))).gpu_capability is None


def test_another_process_answers(tmp_path: Path) -> None:
    """With many ranks, and neither torch nor a process group here on its account."""
    before = "torch" in sys.modules
    found = simulate_apart(job(write_model(tmp_path, "small", layers=2)))
    assert found.peak_bytes == sum(found.breakdown.values())
    assert found.moment in found.moments
    assert ("torch" in sys.modules) == before
    if before:
        import torch.distributed

        assert not torch.distributed.is_initialized()


def test_what_it_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"plan --simulate: .*neither a folder here"):
        simulate_apart(job(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"plan --simulate: .*its config.json cannot be used"):
        simulate_apart(job(tmp_path))


def test_it_does_not_last_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "LIMIT_S", 0.05)
    with pytest.raises(ModelError, match="took longer than 0 minutes"):
        simulate_apart(job("nowhere"))
