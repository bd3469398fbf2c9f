"""What Slurm is asked, and what it answers. Floor 1.

Every call has a time limit: a controller that is busy or away must not hang a login shell, nor a
job that has to end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from vectorlm.errors import ClusterError

PATIENCE_S = 30.0
_AWAY = re.compile(r"_establish_config_source|Unable to contact slurm controller")
_FIELD = re.compile(r"(?:^|\s)([A-Z][A-Za-z/:]*)=")
# States in which a job has processes, or will have them again.
ALIVE = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING"})


def installed() -> bool:
    return shutil.which("scontrol") is not None


def call(
    command: Sequence[str],
    patience_s: float = PATIENCE_S,
    text: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    """What a Slurm command prints; ClusterError with its own words when it fails."""
    try:
        done = subprocess.run(
            command,
            input=text,
            env=environ,
            capture_output=True,
            text=True,
            timeout=patience_s,
            check=False,
        )
    except FileNotFoundError:
        raise ClusterError(
            f"{command[0]} is not on PATH; are you on a machine of the cluster (a login node), and "
            "is Slurm's module loaded?"
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"{command[0]} did not answer within {patience_s:.0f} s; Slurm's controller may be "
            "busy: try again in a minute"
        ) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").replace("\n", "; ")
        if _AWAY.search(said):
            raise ClusterError(
                f"{command[0]} finds no controller of Slurm from here; are you on a machine of the "
                "cluster (a login node)? If so, the controller is down: try again later"
            )
        raise ClusterError(f"`{' '.join(command)}` failed with exit code {done.returncode}: {said}")
    return done.stdout


def show_job(job: str) -> dict[str, str] | None:
    """`scontrol show job`: only for jobs that are queued, run, or ended minutes ago.

    None: Slurm does not know it any more. ClusterError: Slurm cannot be asked.
    """
    try:
        text = call(["scontrol", "-o", "show", "job", job])
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return fields(text.splitlines()[0]) if text.strip() else None


def fields(line: str) -> dict[str, str]:
    """`A=1 B=x y C=` -> {"A": "1", "B": "x y", "C": ""}."""
    parts = _FIELD.split(line)
    return {name: value.strip() for name, value in zip(parts[1::2], parts[2::2], strict=True)}


ACCOUNTED = (
    "JobID",
    "State",
    "ExitCode",
    "DerivedExitCode",
    "Elapsed",
    "Timelimit",
    "NodeList",
    "MaxRSS",
    "Start",
    "End",
    "Comment",
    "WorkDir",
)


def accounting(job: str) -> list[dict[str, str]] | None:
    """`sacct`'s rows of a job, its steps and its earlier starts; None where nothing is kept."""
    try:
        text = call(["sacct", "-j", job, "-D", "-n", "-P", "-o", ",".join(ACCOUNTED)])
    except ClusterError:
        return None
    rows = [line.split("|") for line in text.splitlines()]
    return [dict(zip(ACCOUNTED, row, strict=False)) for row in rows] or None


def own_job() -> str | None:
    """The job this process runs in, as Slurm's commands want it named.

    Of an array's task the array's id and its own number: the plain id of one of the tasks is also
    that of the whole array.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often this job was started again, by Slurm or as a continuation of another job."""
    earlier = os.environ.get("VECTORLM_EARLIER_STARTS", "0")
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + (
        int(earlier) if earlier.isdecimal() else 0
    )
