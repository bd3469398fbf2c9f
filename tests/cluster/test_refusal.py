"""Words of sbatch as Slurm 22.05 prints them, those that a test's cluster cannot be made to say."""

from __future__ import annotations

import pytest

from vectorlm.cluster.refusal import explained
from vectorlm.errors import ClusterError

FAILED = "`sbatch --parsable job.sh` failed with exit code 1: sbatch: error: "
SUBMISSION = "Batch job submission failed: "


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("Invalid account or account/partition combination specified", "slurm.account"),
        ("Invalid qos specification", "slurm.qos"),
        (
            "Requested time limit is invalid (missing or exceeds some limit)",
            "slurm.time",
        ),
        ("User's group not permitted to use this partition", "slurm.partition"),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "slurm.time, nodes or gpus_per_node",
        ),
        ("Invalid generic resource (gres) specification", "slurm.gpus_per_node or slurm.gpu_type"),
        ("Access denied to requested reservation", "slurm.reservation"),
        ("More processors requested than permitted", "slurm.nodes, "),
        ("Node count specification invalid", "slurm.nodes, "),
        ("Invalid job array specification", "sweep"),
    ],
)
def test_the_key_to_change(words: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no Slurm: nothing to choose from
    error = explained(ClusterError(FAILED + SUBMISSION + words))
    first, second = str(error).split("\n")
    assert first == f"sbatch refused the job: {words}"
    assert second.startswith(f"change {key}")
    assert "there is" not in second


def test_the_program_is_not_named_before_each_sentence() -> None:
    error = explained(ClusterError(f"{FAILED}Something; sbatch: error: {SUBMISSION}Else"))
    assert str(error) == "sbatch refused the job: Something; Else"


@pytest.mark.parametrize(
    "text", ["sbatch is not on PATH; are you on ...", "sbatch did not answer within 120 s; ..."]
)
def test_what_is_no_refusal_stays_as_it_is(text: str) -> None:
    error = ClusterError(text)
    assert explained(error) is error
