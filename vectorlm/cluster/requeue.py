"""Whether and how a job that has ended starts again. Floor 1, used by `conclude`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vectorlm.cluster import slurm
from vectorlm.cluster.journal import PastStart
from vectorlm.config.schema import Slurm
from vectorlm.errors import ClusterError


@dataclass(frozen=True)
class Decision:
    again: bool
    reason: str


def is_requeued(job: dict[str, str] | None) -> bool:
    """Whether Slurm has already counted the job's next start."""
    counted = int((job or {}).get("Restarts", "0"))
    return counted > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def decide(
    section: Slurm,
    may_pass: bool,
    starts: Sequence[PastStart],
    restarts: int,
    job: dict[str, str] | None,
) -> Decision:
    """`job` is what Slurm says of it now, None if it cannot be asked."""
    if not may_pass:
        return Decision(False, "it would end the same way again")
    ending = job and _ended_by_slurm(job)
    if ending:
        return Decision(False, ending)
    if not section.requeue:
        return Decision(False, "slurm.requeue is false")
    if restarts >= section.max_requeues:
        return Decision(
            False,
            f"it has been started again {restarts} times, and slurm.max_requeues is "
            f"{section.max_requeues}",
        )
    if _stands_still(starts):
        return Decision(False, "two starts in a row failed without a step between them")
    return Decision(True, f"start {restarts + 2}, of at most {section.max_requeues + 1}")


def _ended_by_slurm(job: dict[str, str]) -> str | None:
    """A job that is being cancelled would rise again if it were requeued."""
    if job.get("JobState") == "RUNNING" or job.get("Reason") == "TimeLimit":
        return None
    return f"it was cancelled (Slurm says {job.get('JobState')})"


def _stands_still(starts: Sequence[PastStart]) -> bool:
    """A fault that comes back at once is not one that passes."""
    if len(starts) < 2:
        return False
    before, last = starts[-2:]
    if any(start.end is not None for start in (before, last)):
        return False
    return _step(last) <= _step(before)


def _step(start: PastStart) -> int:
    steps = [failure.step for failure in start.failures if failure.step is not None]
    return max([*steps, start.start.resumed_from or 0])


def start_again(script: str, config: str) -> str:
    """Have Slurm start this job again; what was done, in words.

    Slurm may end the calling process at once. Where `scontrol requeue` is refused, the script is
    submitted as a new job that waits for this one.
    """
    job = slurm.own_job()
    if job is None:
        raise ClusterError("only a Slurm job can be started again, and this is none")
    try:
        slurm.call(["scontrol", "requeue", job])
    except ClusterError as refusal:
        number = slurm.call(_continuation(job, script, config), environ=_submit_environment())
        return f"submitted job {number.strip().split(';')[0]}, which goes on ({refusal})"
    return f"requeued job {job}"


def _continuation(job: str, script: str, config: str) -> list[str]:
    """The same script with what was asked of sbatch on its command line, too."""
    facts = slurm.show_job(job) or {}
    names = {
        "Partition": "partition",
        "Account": "account",
        "QOS": "qos",
        "TimeLimit": "time",
        "JobName": "job-name",
        "Reservation": "reservation",
        "NumNodes": "nodes",
        "TresPerNode": "gres",
    }
    known = {flag: facts.get(name, "") for name, flag in names.items()}
    known["gres"] = re.sub(r"\bgres[:/]", "", known["gres"])
    known["nodes"] = known["nodes"].split("-")[0]
    flags = [f"--{flag}={value}" for flag, value in known.items() if value not in ("", "(null)")]
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task:
        flags.append(f"--array={task}")
    return ["sbatch", "--parsable", f"--dependency=afterany:{job}", *flags, script, config]


def _submit_environment() -> dict[str, str]:
    """This job's own variables would tell the next one what it is not."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_"))
    }
    return {
        **kept,
        "VECTORLM_CONTINUES": os.environ.get("SLURM_JOB_ID", ""),
        "VECTORLM_EARLIER_STARTS": str(slurm.restarts() + 1),
    }
