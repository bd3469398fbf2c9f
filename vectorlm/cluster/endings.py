"""Recognizes what Slurm, a person or the system did to a start: limits, preemption, cancels, nodes,
signals. Floor 1, used by `causes`.
"""

from __future__ import annotations

import pwd
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

from vectorlm.cluster import slurm
from vectorlm.cluster.evidence import Evidence, Finding, state_line, when
from vectorlm.cluster.faults import at_step
from vectorlm.cluster.joblog import Line
from vectorlm.cluster.progress import newest_checkpoint
from vectorlm.cluster.queue import in_words

LEAD_S = 180.0  # the default of slurm.signal_lead_s, where the configuration cannot be read
TICK_S = 120.0  # by which Slurm may signal earlier than that
_JOB_CANCELLED = re.compile(r"slurmstepd\S* error: \*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ \*\*\*")
_STEP_ENDS = re.compile(
    r"srun: .*(Terminating )|srun: Job step aborted"
    r"|slurmstepd\S* error: \*\*\* STEP \S+ ON \S+ CANCELLED AT \S+ \*\*\*"
)
_PREEMPTION = re.compile(r"slurmstepd\S* error: \*\*\* .* DUE TO PREEMPTION")
_TIME_LIMIT = re.compile(r"slurmstepd\S* error: \*\*\* .* DUE TO TIME LIMIT")
_REQUEUE = re.compile(r"slurmstepd\S* error: \*\*\* .* DUE TO JOB REQUEUE")
_NODE = re.compile(
    r"srun: error: Node failure on (\S+)|slurmstepd\S* error: \*\*\* .* DUE TO NODE FAILURE"
    r"|srun: error: Aborting, io error and missing step on node (?:\d+)"
)
_OOM_KILL = re.compile(
    r"slurmstepd\S* error: (?:Detected \d+ oom[_-]kill|.*exceeded (?:job )?memory limit"
    r"|Exceeded job memory limit)|srun: error: (\S+): tasks? ([\d,-]+): Out Of Memory"
    r"|.*DataLoader worker .* is killed by signal: Killed"
)
_NO_STEP = re.compile(
    r"srun: (?:error|fatal): (?!.*already complet)(?:Unable to create step for job \S+: (.*)"
    r"|(Task launch .* failed.*)|(Unable to confirm allocation.*)|(.*Job credential expired.*)"
    r"|(Invalid .*))"
)
_NO_STEP_PASSES = re.compile(
    r"credential|timed out|confirm allocation|communicat|temporarily|Socket|connect", re.I
)
# What the first rank prints, for when its records could not be written.
_FINISHED = re.compile(r"finished: \S+$")
_STOPPED = re.compile(r"stopped by (SIG\w+|another rank): everything is saved")
SIGNALS = {
    "Killed": "SIGKILL",
    "Aborted": "SIGABRT",
    "Segmentation fault": "SIGSEGV",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
    "Floating point exception": "SIGFPE",
}


def finished(evidence: Evidence) -> Finding | None:
    end = evidence.start.end if evidence.start else None
    if end and end.outcome == "finished":
        proof = [Line("outcome: finished", "end.json")]
        return Finding(f"finished{at_step(end.step)}", proof, step=end.step)
    seen = evidence.search(_FINISHED) if not end and evidence.over else None
    return Finding("finished", [seen[1]]) if seen else None


# --- ended from outside ---------------------------------------------------------------------------


def kernel_killed(evidence: Evidence) -> Finding | None:
    seen = evidence.search(_OOM_KILL) if evidence.over or evidence.task_ends else None
    if seen is None and evidence.state != "OUT_OF_MEMORY":
        return None
    proof = [seen[1]] if seen else [state_line(evidence)]
    ends = [e for e in evidence.task_ends if e.words == "Out Of Memory"]
    ends = ends or [e for e in evidence.task_ends if e.first and e.words == "Killed"]
    proof += [end.line for end in ends[:1] if end.line not in proof]
    used = max((row.get("MaxRSS", "") for row in evidence.rows), key=_size, default="")
    proof += [Line(f"MaxRSS {used}", "sacct")] if used else []
    rank = ends[0].ranks[0] if ends and ends[0].ranks else None
    host = ends[0].host if ends else evidence.host_of(rank)
    place = (f" on {host}" if host else "") + (f" (rank {rank})" if rank is not None else "")
    return Finding(
        f"the host's memory was used up{place}, and the kernel killed a process"
        f"{at_step(evidence.last_step)}",
        proof,
        rank,
        host,
        evidence.last_step,
    )


def _size(text: str) -> float:
    """`118G` -> bytes."""
    match = re.fullmatch(r"([\d.]+)([KMGTP]?)", text)
    return float(match[1]) * 1024 ** " KMGTP".index(match[2] or " ") if match else 0.0


def preempted(evidence: Evidence) -> Finding | None:
    seen = evidence.search(_PREEMPTION)
    time = evidence.facts.get("PreemptTime", "None")
    graceful = time not in ("None", "N/A", "") and evidence.start and evidence.start.end
    if not (seen or graceful or evidence.state == "PREEMPTED"):
        return None
    proof = [seen[1]] if seen else [Line(f"PreemptTime={time}", "scontrol")]
    return _outside(evidence, "preempted: another job took its nodes", proof)


def node_failed(evidence: Evidence) -> Finding | None:
    seen = evidence.search(_NODE)
    if seen:
        named = next(
            (m[1] for line in evidence.lines if (m := _NODE.match(line.text)) and m[1]), None
        )
        node = f"node {named}" if named else "a node"
        found = _outside(evidence, f"{node} failed", [seen[1]])
        return Finding(found.sentence, found.proof, None, named, found.step)
    if evidence.state in ("NODE_FAIL", "BOOT_FAIL"):
        failed = evidence.facts.get("FailedNode", "").strip("()") or "a node"
        return _outside(evidence, f"{failed} failed", [state_line(evidence)])
    if evidence.followed and _without_a_word(evidence):
        proof = [*evidence.lines[-1:], Line(f"start {(evidence.number or 0) + 1} followed", "log")]
        return _outside(evidence, "its first node vanished, and Slurm started it again", proof)
    return None


def _without_a_word(evidence: Evidence) -> bool:
    past = evidence.start
    told = past and (past.end or past.failures)
    said = any(line.text.startswith(("srun: ", "slurmstepd")) for line in evidence.lines)
    return not (told or said)


def time_limit(evidence: Evidence) -> Finding | None:
    """Reached before it could save; where it did save in time, it was stopped."""
    end = evidence.start.end if evidence.start else None
    if end and end.outcome == "stopped" and end.saved:
        return None
    if not _at_its_limit(evidence):
        return None
    seen = evidence.search(_TIME_LIMIT)
    limit = evidence.facts.get("TimeLimit") or _row(evidence, "Timelimit")
    words = f"its time limit{f' ({limit})' if limit else ''} was reached before it had saved"
    return _outside(evidence, words, [seen[1]] if seen else [state_line(evidence)])


def _at_its_limit(evidence: Evidence) -> bool:
    ended = evidence.state in ("TIMEOUT", "DEADLINE") or evidence.search(_TIME_LIMIT) is not None
    return ended or evidence.facts.get("Reason") == "TimeLimit"


def requeued(evidence: Evidence) -> Finding | None:
    seen = evidence.search(_REQUEUE)
    if not (seen or evidence.requeued):
        return None
    proof = [seen[1]] if seen else [Line(f"Restarts={evidence.facts['Restarts']}", "scontrol")]
    return _outside(evidence, "requeued (scontrol requeue)", proof)


def cancelled(evidence: Evidence) -> Finding | None:
    job = evidence.search(_JOB_CANCELLED)
    ending = evidence.code is not None and evidence.state == "COMPLETING"
    ending = ending and not _at_its_limit(evidence)
    if evidence.state == "CANCELLED" or job or ending:
        proof = [job[1]] if job else [state_line(evidence)]
        what = f"cancelled{_by_whom(evidence)}" + ("" if _began(evidence) else " before it began")
        return _outside(evidence, what, proof)
    # When a step is cancelled, srun is told to abort; when a task fails, it ends the others itself.
    # How tasks end may be seen before either.
    step = evidence.search(_STEP_ENDS)
    if step is None or step[0][1] or (evidence.start and evidence.start.end):
        return None
    return _outside(evidence, "its step was cancelled (scancel JOB.STEP)", [step[1]])


def _began(evidence: Evidence) -> bool:
    return bool(evidence.start or evidence.lines or evidence.code is not None)


def _by_whom(evidence: Evidence) -> str:
    match = re.search(r"CANCELLED by (\d+)", _row(evidence, "State"))
    if match is None:
        return " (scancel)"
    with suppress(KeyError):
        return f" by {pwd.getpwuid(int(match[1])).pw_name} (scancel)"
    return f" by user {match[1]} (scancel)"


def stopped(evidence: Evidence) -> Finding | None:
    end = evidence.start.end if evidence.start else None
    if end and end.outcome == "stopped" and end.saved:
        return _outside(evidence, _asked_by(evidence, end.signal), [_end_line(evidence)])
    seen = evidence.search(_STOPPED) if not end and evidence.over else None
    if seen is None:
        return None if end else _stopped_at_birth(evidence)
    return Finding(f"stopped on request by {seen[0][1]}; everything is saved", [seen[1]])


def _stopped_at_birth(evidence: Evidence) -> Finding | None:
    """Python had not come so far as to hear the signal, which then ends a process."""
    signals = {"User defined signal 1": "SIGUSR1", "User defined signal 2": "SIGUSR2"}
    ends = [end for end in evidence.task_ends if end.words in signals]
    if not ends or evidence.start:
        return None
    name = signals[ends[0].words]
    return Finding(f"stopped on request by {name} while it was starting", [ends[0].line])


def stopped_unsaved(evidence: Evidence) -> Finding | None:
    end = evidence.start.end if evidence.start else None
    if end is None or end.outcome != "stopped" or end.saved:
        return None
    return Finding(
        f"{_asked_by(evidence, end.signal)}{at_step(end.step)}, and nothing was saved",
        [_end_line(evidence)],
        step=end.step,
    )


def _end_line(evidence: Evidence) -> Line:
    assert evidence.start
    assert evidence.start.end
    return Line(f"outcome: stopped, signal: {evidence.start.end.signal}", "end.json")


def _asked_by(evidence: Evidence, signal: str | None) -> str:
    left = _left_s(evidence)
    section = evidence.config.slurm if evidence.config else None
    near = TICK_S + (section.signal_lead_s if section else LEAD_S)
    by = f" by {signal}" if signal else ""
    if left is not None and left < near:
        return f"stopped{by}, for its time limit was {in_words(max(left, 0))} away"
    return f"stopped on request{by}"


def _left_s(evidence: Evidence) -> float | None:
    """From the end of a start to its time limit."""
    end = evidence.start.end if evidence.start else None
    begun = when(evidence.facts.get("StartTime") or _row(evidence, "Start"))
    limit = _duration(evidence.facts.get("TimeLimit") or _row(evidence, "Timelimit"))
    if end is None or begun is None or limit is None:
        return None
    return begun + limit - end.time


def _outside(evidence: Evidence, what: str, proof: Sequence[Line]) -> Finding:
    return Finding(f"{what}; {_kept(evidence)}", proof, step=evidence.last_step)


def _kept(evidence: Evidence) -> str:
    """What is left of the work."""
    end = evidence.start.end if evidence.start else None
    if end and end.outcome == "stopped" and end.saved:
        return f"everything is saved{at_step(end.step)}"
    if evidence.start is None and evidence.last_step is None:
        return "training had not begun"
    if evidence.start is None or not evidence.newest:
        return "it goes on from its last checkpoint"
    with suppress(OSError):
        saved = newest_checkpoint(evidence.start.folder.parents[1])
        if saved:
            return f"the last checkpoint is of step {saved.step}"
    return "there is no checkpoint"


def ended_by_slurm(evidence: Evidence) -> bool:
    """Whether anything but a rank began the end."""
    seen = (_PREEMPTION, _TIME_LIMIT, _REQUEUE, _NODE, _OOM_KILL)
    states = ("PREEMPTED", "NODE_FAIL", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "CANCELLED")
    return evidence.state in states or any(evidence.search(pattern) for pattern in seen)


def rank_killed(evidence: Evidence) -> Finding | None:
    for end in evidence.task_ends:
        signal = SIGNALS.get(end.words)
        if not end.first or signal is None:
            continue
        rank = end.ranks[0] if end.ranks else None
        return Finding(
            f"rank {rank} on {end.host} was ended by {signal} ({end.words})"
            f"{at_step(evidence.last_step)}",
            [end.line],
            rank,
            end.host,
            evidence.last_step,
            cure=_cure_of(signal, evidence),
            may_pass=signal != "SIGILL",
        )
    return None


def _cure_of(signal: str, evidence: Evidence) -> str | None:
    if signal == "SIGKILL" and not evidence.job:
        return (
            "A SIGKILL that nobody sent is most often the kernel's, for lack of memory: `dmesg` "
            "tells. Use fewer processes, or lower `dataset.train_bs`; started again, the run goes "
            "on from its last checkpoint"
        )
    return _CURES_OF_SIGNALS.get(signal)


_CURES_OF_SIGNALS = {
    "SIGSEGV": "A native library crashed. If it comes again at the same step, it is a fault of a "
    "library: set PYTHONFAULTHANDLER=1 to see where, and update torch and the driver; if it comes "
    "on one node only, leave that out with slurm.exclude",
    "SIGABRT": "A native library gave up; the lines above say why. Update torch and the driver, or "
    "leave the node out with slurm.exclude",
    "SIGILL": "A package was built for another kind of CPU: install it again on such a node, or "
    "choose the nodes with slurm.constraint",
}


def no_step(evidence: Evidence) -> Finding | None:
    seen = evidence.search(_NO_STEP)
    if seen is None:
        return None
    said = next(text for text in seen[0].groups() if text)
    passes = bool(_NO_STEP_PASSES.search(said))
    return Finding(f"srun could not start the ranks: {said}", [seen[1]], may_pass=passes)


NO_SLURM = (
    "Look at what the shell that started it printed; `dmesg` tells whether memory ran out, `df` "
    "whether the disk is full. Start it again: it goes on from its last checkpoint"
)


def unknown(evidence: Evidence) -> Finding:
    """Always something: what there was to look at, and how it ends."""
    looked = ["its records" if evidence.start else "no record of the start"]
    looked.append(f"{len(evidence.lines)} lines of its log" if evidence.lines else "no log")
    if evidence.state:
        looked.append(f"Slurm ({evidence.state})")
    elif not slurm.installed():
        looked.append("no Slurm on this machine")
    code = f" with exit code {evidence.code}" if evidence.code is not None else ""
    ends = [end.line for end in evidence.task_ends if end.first][:1]
    last = [line for line in evidence.lines if line.text and line not in ends][-3:]
    return Finding(
        f"ended{code}{at_step(evidence.last_step)}, and nothing says why; looked at "
        f"{', '.join(looked)}",
        [*ends, *last],
        step=evidence.last_step,
        cure=None if evidence.job else NO_SLURM,
        may_pass=evidence.code != 0,
    )


# --- how Slurm writes -----------------------------------------------------------------------------


def _row(evidence: Evidence, name: str) -> str:
    return evidence.rows[0].get(name, "") if evidence.rows else ""


def _duration(text: str | None) -> float | None:
    """`1-02:03:04` -> seconds."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text or "")
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    span = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    return span.total_seconds()
