"""A job starts again when that can help, and only then."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from vectorlm.cluster import requeue
from vectorlm.cluster.journal import EndRecord, PastStart, RankRecord, new_start
from vectorlm.config.schema import Slurm

RUNNING = {"JobState": "RUNNING", "Restarts": "0"}


def past(
    step: int | None = None, outcome: str | None = None, resumed: int | None = None
) -> PastStart:
    """A start that failed at a step, or (with an outcome) ended by itself."""
    failure = RankRecord(0, "n1", time.time(), "RankLostError", "", "", 1, step)
    end = EndRecord(time.time(), outcome, step) if outcome else None  # type: ignore[arg-type]
    start = replace(new_start("config.yaml"), resumed_from=resumed)
    return PastStart(Path("x"), start, [] if end else [failure], end)


def decide(
    may_pass: bool = True,
    starts: tuple[PastStart, ...] = (),
    restarts: int = 0,
    job: dict[str, str] | None = RUNNING,
    **section: object,
) -> requeue.Decision:
    return requeue.decide(Slurm(**section), may_pass, starts, restarts, job)  # type: ignore[arg-type]


def test_what_may_pass_starts_again() -> None:
    decision = decide(starts=(past(40),))
    assert decision.again
    assert decision.reason == "start 2, of at most 51"
    assert decide(job=None).again, "Slurm's controller does not answer"


def test_what_would_fail_again_does_not() -> None:
    assert decide(may_pass=False).reason == "it would end the same way again"


def test_the_configuration_has_the_last_word() -> None:
    assert decide(requeue=False).reason == "slurm.requeue is false"
    assert decide(restarts=2, max_requeues=3).again
    assert "slurm.max_requeues is 3" in decide(restarts=3, max_requeues=3).reason
    assert not decide(max_requeues=0).again


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"JobState": "COMPLETING", "Reason": "None", "Restarts": "0"}, "it was cancelled"),
        ({"JobState": "CANCELLED", "Reason": "None", "Restarts": "0"}, "it was cancelled"),
    ],
)
def test_a_job_that_slurm_is_ending_is_left_alone(job: dict[str, str], words: str) -> None:
    """A requeue would bring back a job that its user has cancelled."""
    decision = decide(job=job)
    assert not decision.again
    assert words in decision.reason


def test_a_job_that_slurm_has_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert requeue.is_requeued({"JobState": "COMPLETING", "Restarts": "2"})
    assert not requeue.is_requeued({"JobState": "COMPLETING", "Restarts": "1"})
    assert not requeue.is_requeued(None)


def test_a_time_limit_that_came_before_the_save_is_no_cancellation() -> None:
    assert decide(job={"JobState": "COMPLETING", "Reason": "TimeLimit", "Restarts": "0"}).again


@pytest.mark.parametrize(
    ("starts", "again"),
    [
        ((past(40), past(40, resumed=30)), False),
        ((past(None), past(None)), False),
        ((past(40), past(41, resumed=30)), True),
        ((past(40, "stopped"), past(40, resumed=40)), True),
        ((past(40), past(40, "stopped", resumed=30)), True),
        ((past(10), past(40), past(35, resumed=30)), False),
    ],
)
def test_a_fault_that_comes_back_at_once_does_not_pass(
    starts: tuple[PastStart, ...], again: bool
) -> None:
    assert decide(starts=starts).again == again
