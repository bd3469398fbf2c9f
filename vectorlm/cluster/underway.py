"""Recognizes that a start is not over: its job waits, runs, or is stuck. Floor 1, used by
`causes`.
"""

from __future__ import annotations

import re

from vectorlm.cluster.evidence import Evidence, Finding, state_line, when
from vectorlm.cluster.faults import at_step
from vectorlm.cluster.joblog import Line
from vectorlm.cluster.progress import read_progress
from vectorlm.cluster.queue import Job, in_words, waiting_for

SILENT_S = 1800.0  # without any sign, besides five times the usual
# What can be done about a reason of Slurm's, by its name.
_WAITING = {
    "DependencyNeverSatisfied": "It will never start: scancel it, see why the job before it failed "
    "(vectorlm why {before}), and submit again",
    "JobHeldUser": "scontrol release JOB lets it start",
    "JobHeldAdmin|.*[Hh]eld.*": "scontrol show job has the reason; ask those who run the cluster",
    "(QOS|Assoc|Max|AccountingPolicy).*": "Wait for other jobs of yours or of your group to end; "
    "if it is a limit of a single job, ask for less: slurm.nodes, slurm.gpus_per_node, slurm.time",
    "Partition(Time|Node)Limit|PartitionConfig": "It will never start as it is: scancel it, lower "
    "slurm.time, slurm.nodes or slurm.gpus_per_node, or take another slurm.partition",
    "BadConstraints|.*NotAvail|Invalid.*|.*NotAllowed": "Look at slurm.partition, "
    "slurm.constraint, slurm.account, slurm.qos and slurm.exclude; before a maintenance (scontrol "
    "show reservation) a shorter slurm.time may fit",
}


def waits(evidence: Evidence) -> Finding | None:
    if evidence.state not in ("PENDING", "REQUEUED") or evidence.code is not None:
        return None
    facts = evidence.facts
    reason = facts.get("Reason", "None")
    begins = when(facts.get("StartTime"))
    job = Job(evidence.job or "", "PENDING", begins, "", "", reason)
    again = "to start again" if (evidence.number or 1) > 1 else "in the queue"
    proof = [Line(f"JobState=PENDING Reason={reason}", "scontrol")]
    return Finding(
        f"waits {again}: {waiting_for(job)}", proof, cure=_cure_of_waiting(reason, facts)
    )


def _cure_of_waiting(reason: str, facts: dict[str, str]) -> str | None:
    word = reason.strip("()").split(",")[0].split(":")[0]
    failed = re.search(r"(\d+\w*)(?:_\*)?\(failed\)", facts.get("Dependency", ""))
    for pattern, cure in _WAITING.items():
        if re.fullmatch(pattern, word):
            return cure.format(before=failed[1] if failed else "JOB")
    return None


def runs(evidence: Evidence) -> Finding | None:
    if not _goes_on(evidence):
        return None
    silence = evidence.silence_s
    if evidence.state in ("SUSPENDED", "STOPPED"):
        return Finding("Slurm has suspended it; it goes on by itself", [state_line(evidence)])
    heard = f", last heard of {in_words(silence)} ago" if silence is not None else ""
    return Finding(f"is running{at_step(evidence.last_step)}{heard}", [state_line(evidence)])


def stuck(evidence: Evidence) -> Finding | None:
    silence = evidence.silence_s
    if not _goes_on(evidence) or evidence.state in ("SUSPENDED", "STOPPED") or silence is None:
        return None
    usual = read_progress(evidence.folder).interval_s if evidence.folder else None
    if silence < max(SILENT_S, 5 * (usual or 0.0)):
        return None
    return Finding(
        f"is running, but nothing was heard of it for {in_words(silence)}"
        f"{at_step(evidence.last_step)}",
        [state_line(evidence), *evidence.lines[-2:]],
        step=evidence.last_step,
    )


def _goes_on(evidence: Evidence) -> bool:
    ended = evidence.start and (evidence.start.end or evidence.start.failures)
    return not evidence.over and not ended and evidence.state != "COMPLETING"
