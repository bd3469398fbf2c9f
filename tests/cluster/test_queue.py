"""Slurm's words in ours; the queue itself is in tests/slurm."""

from __future__ import annotations

import time

import pytest

from vectorlm.cluster.queue import Job, ended_by, in_words, waiting_for


def job(reason: str, start: float | None = None) -> Job:
    return Job("17", "PENDING", start, "10:00", "", reason)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "waits for free nodes"),
        ("(Priority)", "other jobs come first"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "nodes it asks for are down or reserved"),
        ("QOSMaxJobsPerUserLimit", "quality of service is reached (QOSMaxJobsPerUserLimit)"),
        ("AssocGrpGRESMinutes", "a limit of its account is reached (AssocGrpGRESMinutes)"),
        ("launch failed requeued held", "launch failed requeued held"),
    ],
)
def test_why_a_job_waits(reason: str, words: str) -> None:
    assert words in waiting_for(job(reason))


def test_when_a_job_is_expected() -> None:
    start = time.mktime((2030, 5, 1, 14, 5, 9, 0, 0, -1))
    assert "; start expected 14:05:09 in " in waiting_for(job("Priority", start))
    assert "expected" not in waiting_for(job("Priority"))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("CANCELLED by 1000", "it was cancelled"),
        ("NODE_FAIL", "a node failed"),
        ("STRANGE", "Slurm says STRANGE"),
    ],
)
def test_slurms_last_word(state: str, words: str) -> None:
    assert ended_by(state) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (12 * 60 + 59, "12 min"),
        (3600, "1 h"),
        (3 * 3600 + 10 * 60, "3 h 10 min"),
        (86400, "1 day"),
        (2 * 86400 + 4 * 3600, "2 days 4 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
